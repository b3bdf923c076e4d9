"""Candidate pools as a FIFO against python deques, for any number of ranks and of switches."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalowrank.lowrank.pool import CandidatePools
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.switch_plan import Geometry, SwitchPlan, make_plan
from megalowrank.parallel.partition import share

CPU = torch.device("cpu")
SHAPES = [(9, 7, 5), (6, 11, 5), (4, 4, 4), (20, 15, 2)]


def host(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((numel,), torch.nan, dtype=dtype)


def geometry() -> Geometry:
    """Of matrices [out, in] with rank r: spare 2, 1, 0 and 13."""
    shapes = [
        SimpleNamespace(out_features=m, in_features=n, rank=r, rows=share(m), columns=share(n)) for m, n, r in SHAPES
    ]
    return Geometry.of(shapes)  # type: ignore[arg-type]


def vectors(numbers: list[int], length: int) -> torch.Tensor:
    """Rows that name themselves: number + k / 1000 in place k."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None] + torch.arange(length) / 1000


class Simulation:
    """Active vectors as one table per factor, spare ones in the pools of ``world`` ranks, and both as numbers."""

    def __init__(self, world: int) -> None:
        self.geometry = geometry()
        self.slots = np.repeat(self.geometry.spare, 2)
        self.pools = [CandidatePools(self.slots, self.geometry.lengths, rank, world, host, torch.float64, CPU)
                      for rank in range(world)]  # fmt: skip
        self.switched = np.zeros(len(SHAPES), dtype=np.int64)
        self.active: list[torch.Tensor] = []
        self.numbers: list[list[int]] = []
        self.queues: list[deque[int]] = []
        for factor, (length, slots) in enumerate(zip(self.geometry.lengths.tolist(), self.slots.tolist(), strict=True)):
            rank, base = SHAPES[factor // 2][2], 1000 * (factor + 1)
            self.numbers.append([base + i for i in range(rank)])
            self.queues.append(deque(base + 500 + i for i in range(slots)))
            self.active.append(vectors(self.numbers[-1], length))
            for pool in self.pools:
                pool.fill(factor, vectors(list(self.queues[-1]), length))

    def plan(self, counts: np.ndarray) -> SwitchPlan:
        return make_plan(self.geometry, counts, self.switched, None)

    def packed(self, wanted: VectorSet) -> torch.Tensor:
        rows = [self.active[f][row] for f, row in zip(wanted.factors, wanted.rows, strict=True)]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)

    def step(self, plan: SwitchPlan) -> None:
        """What ``SwitchLoRA`` does with tables and pools."""
        taken = [pool.take(plan.fetched) for pool in self.pools]
        owners = sum((part != 0).int() for part in taken)
        assert (owners <= 1).all(), "every vector has one owner"
        fetched, outgoing = torch.stack(taken).sum(0), self.packed(plan.outgoing)
        incoming = plan.incoming(outgoing, fetched).split(plan.outgoing.lengths.tolist())
        for f, row, values in zip(plan.outgoing.factors, plan.outgoing.rows, incoming, strict=True):
            self.active[f][row] = values
        where, values = plan.stored(outgoing)
        for pool in self.pools:
            pool.put(where, values)
        self.switched += plan.counts

    def follow(self, counts: np.ndarray) -> None:
        """The same with deques: the vector that leaves goes to the end, the first one comes in."""
        before = self.switched - counts
        for j, (_, _, rank) in enumerate(SHAPES):
            for factor, ahead in ((2 * j, 0), (2 * j + 1, rank // 2)):
                for i in range(int(counts[j])):
                    position = (int(before[j]) + i + ahead) % rank
                    self.queues[factor].append(self.numbers[factor][position])
                    self.numbers[factor][position] = self.queues[factor].popleft()

    def check(self) -> None:
        for factor, (numbers, queue) in enumerate(zip(self.numbers, self.queues, strict=True)):
            length, spare = int(self.geometry.lengths[factor]), len(queue)
            assert torch.equal(self.active[factor], vectors(numbers, length))
            whole = torch.zeros(spare, length, dtype=torch.float64)
            for pool in self.pools:
                whole[pool.rank :: pool.world] = pool.local(factor)
            order = [(int(self.switched[factor // 2]) + i) % max(spare, 1) for i in range(spare)]
            assert torch.equal(whole[order], vectors(list(queue), length))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [False, True])
def test_is_a_fifo(world: int, prefetch: bool) -> None:
    """Up to all vectors in one step, which is many times a small pool; the pools are looked at now and then, since
    looking drops what was fetched ahead."""
    simulation, source, most = Simulation(world), np.random.default_rng(world), np.zeros(len(SHAPES))
    limits = np.array([5, 5, 0, 2])
    counts = source.integers(0, limits + 1)
    for step in range(120):
        plan = simulation.plan(counts)
        if prefetch:
            for pool in simulation.pools:
                pool.prefetch(plan.fetched)
        simulation.step(plan)
        simulation.follow(counts)
        most = np.maximum(most, counts)
        counts = source.integers(0, limits + 1) * int(source.random() < 0.8)
        if step % 10 == 9:
            simulation.check()
    assert most.tolist() == limits.tolist() and simulation.switched[2] == 0
    assert (most[:2] > simulation.geometry.spare[:2]).all()


@pytest.mark.parametrize("world", [1, 3])
def test_fetching_ahead_right_after_a_store_of_the_same_slots(world: int) -> None:
    """Every slot of the small pools is stored and fetched in each step; now and then nobody takes what was fetched."""
    simulation = Simulation(world)
    plan = simulation.plan(np.array([3, 1, 0, 1]))
    for step in range(40):
        if step % 5 == 0:
            plan = simulation.plan(np.array([2, 4, 0, 2]))
        simulation.step(plan)
        simulation.follow(plan.counts)
        plan = simulation.plan(np.array([3, 1, 0, 1 + step % 2]))
        for pool in simulation.pools:
            pool.prefetch(plan.fetched)
        for factor, numbers in enumerate(simulation.numbers):
            assert torch.equal(simulation.active[factor], vectors(numbers, int(simulation.geometry.lengths[factor])))
    simulation.check()


def test_every_slot_is_held_once() -> None:
    for world in (1, 2, 3, 4, 20):
        pools = Simulation(world).pools
        assert sum(pool.local_slots for pool in pools).tolist() == pools[0].slots.tolist()  # type: ignore[attr-defined]
        whole = int((pools[0].slots * pools[0].lengths).sum()) * 8
        assert sum(pool.nbytes for pool in pools) == whole
        assert max(pool.nbytes for pool in pools) - min(pool.nbytes for pool in pools) <= 8 * int(
            pools[0].lengths.sum()
        )


def test_without_any_candidate() -> None:
    """All matrices as large as the rank: nothing to hold, take or put."""
    slots, lengths = np.zeros(4, dtype=np.int64), np.array([3, 4, 5, 6])
    pool = CandidatePools(slots, lengths, 0, 1, host, torch.float32, CPU)
    none = VectorSet(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    pool.prefetch(none)
    assert pool.take(none).numel() == 0 and pool.nbytes == 0
    pool.put(none, torch.zeros(0))
    assert pool.local(2).shape == (0, 5)
