"""The sharded state view against plain arrays, for random cuts into partitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megalowrank.lowrank.state import FlatForwardCopy, FlatPartition, Fragment, OptimizerStateView
from megalowrank.lowrank.vectors import VectorSet, clip_runs, element_index

CPU = torch.device("cpu")
KINDS = ("master", "exp_avg", "exp_avg_sq")
FACTORS = [(5, 7), (3, 11), (1, 4), (8, 2)]
ORDER = ["norm", 0, 2, "norm", 1, 3, "norm"]
"""What lies in the flat tensor, in this order; norms have 6 elements and are no factor."""


class Dense:
    """The factors as arrays."""

    def __init__(self) -> None:
        source = np.random.default_rng(0)
        self.state = {kind: [source.normal(size=shape) for shape in FACTORS] for kind in KINDS}
        self.forward = [values.astype(np.float32).astype(np.float64) * 2 for values in self.state["master"]]


class Hidden:
    """A forward copy that cannot be read here, as under ZeRO-3; remembers what was written."""

    dtype, device = torch.bfloat16, CPU

    def __init__(self) -> None:
        self.written: list[tuple[VectorSet, torch.Tensor]] = []

    def read(self, vectors: VectorSet) -> None:
        return None

    def write(self, vectors: VectorSet, packed: torch.Tensor) -> None:
        self.written.append((vectors, packed.clone()))


def vectors(source: np.random.Generator, most: int = 9) -> VectorSet:
    """Some vectors, in any order, none twice."""
    pairs = [(f, row) for f, (rows, _) in enumerate(FACTORS) for row in range(rows)]
    chosen = [pairs[i] for i in source.permutation(len(pairs))[: source.integers(0, most)]]
    factors = np.array([f for f, _ in chosen], dtype=np.int64)
    rows = np.array([row for _, row in chosen], dtype=np.int64)
    return VectorSet(factors, rows, np.array([FACTORS[f][1] for f, _ in chosen], dtype=np.int64))


def packed(tables: list[np.ndarray], wanted: VectorSet) -> torch.Tensor:
    rows = [tables[f][row] for f, row in zip(wanted.factors, wanted.rows, strict=True)]
    return torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0, dtype=torch.float64)


def shapes() -> list[tuple[int, ...]]:
    return [(6,) if what == "norm" else FACTORS[what] for what in ORDER]  # type: ignore[index]


def cut_state(dense: Dense, cuts: list[int]) -> tuple[list[torch.nn.Parameter], list[FlatPartition]]:
    """Partitions of the flat state, each with a few elements of padding before its first fragment."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes()]
    flats = {kind: np.concatenate([np.full(6, -1.0) if what == "norm" else dense.state[kind][what].reshape(-1)  # type: ignore[index]
                                   for what in ORDER]) for kind in KINDS}  # fmt: skip
    total, pad, partitions = len(flats["master"]), 3, []
    for begin, end in zip([0, *cuts], [*cuts, total], strict=True):
        fragments, position = [], 0
        for parameter in parameters:
            first, last = max(begin, position), min(end, position + parameter.numel())
            if first < last:
                fragments.append(Fragment(parameter, first - begin + pad, first - position, last - first))
            position += parameter.numel()
        flat = {kind: torch.cat((torch.full((pad,), 9.0), torch.from_numpy(flats[kind][begin:end].copy())))
                for kind in KINDS}  # fmt: skip
        partition = FlatPartition(flat["master"], [], fragments)
        partition.exp_avg, partition.exp_avg_sq = flat["exp_avg"], flat["exp_avg_sq"]
        partitions.append(partition)
    return [parameters[ORDER.index(f)] for f in range(len(FACTORS))], partitions


def forward_copy(dense: Dense) -> FlatForwardCopy:
    flat = torch.from_numpy(np.concatenate([values.reshape(-1) for values in dense.forward])).float()
    sizes = np.array([values.size for values in dense.forward])
    return FlatForwardCopy(flat, np.cumsum(sizes) - sizes)


def total() -> int:
    return sum(int(np.prod(shape)) for shape in shapes())


def all_cuts() -> list[list[int]]:
    source = np.random.default_rng(1)
    random = [sorted(source.choice(np.arange(1, total()), n, replace=False).tolist()) for n in (1, 1, 2, 3, 6, 20)]
    return [[], [0], [total()], *random, list(range(1, total()))]


def check(dense: Dense, partitions: list[FlatPartition], cuts: list[int]) -> None:
    """All partitions hold what the arrays say, and padding and norms are as they were."""
    for kind in KINDS:
        flat = torch.cat([getattr(partition, kind)[3:] for partition in partitions])
        expected = cut_state(dense, [])[1][0]
        assert torch.equal(flat, getattr(expected, kind)[3:]), (kind, cuts)
        assert all((getattr(partition, kind)[:3] == 9.0).all() for partition in partitions)


@pytest.mark.parametrize("cuts", all_cuts(), ids=len)
def test_verbs_on_random_cuts(cuts: list[int]) -> None:
    dense, source = Dense(), np.random.default_rng(len(cuts))
    factors, partitions = cut_state(dense, cuts)
    forward = forward_copy(dense)
    view = OptimizerStateView(factors, partitions, forward, None, masters_sharded=False)
    for _ in range(25):
        wanted, seen, beside = vectors(source), vectors(source), torch.rand(int(source.integers(0, 5))).double()
        masters, values, rest = view.read(wanted, seen, beside)
        assert torch.equal(masters, packed(dense.state["master"], wanted))
        assert torch.equal(values, packed(dense.forward, seen).float().double())
        assert torch.equal(rest, beside)
        reset, new = vectors(source), torch.from_numpy(source.normal(size=wanted.numel))
        view.write(wanted, new)
        view.zero(reset)
        write(dense, wanted, new)
        for kind in ("exp_avg", "exp_avg_sq"):
            for f, row in zip(reset.factors, reset.rows, strict=True):
                dense.state[kind][f][row] = 0.0
        check(dense, partitions, cuts)
        assert torch.equal(forward.flat, forward_copy(dense).flat)


def write(dense: Dense, wanted: VectorSet, new: torch.Tensor) -> None:
    for f, row, values in zip(wanted.factors, wanted.rows, new.split(wanted.lengths.tolist()), strict=True):
        dense.state["master"][f][row] = values.numpy()
        dense.forward[f][row] = values.float().double().numpy()


@pytest.mark.parametrize("cuts", all_cuts(), ids=len)
def test_ranks_with_one_partition_each_add_up(cuts: list[int]) -> None:
    """What every rank finds of masters and of hidden forward copies sums to the whole; writes need no exchange."""
    dense, source = Dense(), np.random.default_rng(len(cuts))
    factors, partitions = cut_state(dense, cuts)
    views = [OptimizerStateView(factors, [p], Hidden(), None, masters_sharded=True) for p in partitions]
    for _ in range(10):
        wanted, seen = vectors(source), vectors(source)
        parts = [view.read(wanted, seen, torch.ones(2, dtype=torch.float64)) for view in views]
        assert torch.equal(sum(part[0] for part in parts), packed(dense.state["master"], wanted))
        rounded = packed(dense.state["master"], seen).to(torch.bfloat16).double()
        assert torch.equal(sum(part[1] for part in parts), rounded)
        new = torch.from_numpy(source.normal(size=wanted.numel))
        for view in views:
            view.write(wanted, new)
            view.zero(seen)
            assert view.forward.written[-1][0] is wanted and torch.equal(view.forward.written[-1][1], new)
        write(dense, wanted, new)
        for kind in ("exp_avg", "exp_avg_sq"):
            for f, row in zip(seen.factors, seen.rows, strict=True):
                dense.state[kind][f][row] = 0.0
        check(dense, partitions, cuts)


def test_clocks_count_from_the_last_restart() -> None:
    dense = Dense()
    factors, partitions = cut_state(dense, [40])
    view = OptimizerStateView(factors, partitions, forward_copy(dense), None, masters_sharded=False)
    births = [np.zeros(rows, dtype=np.int64) for rows, _ in FACTORS]
    source = np.random.default_rng(3)
    for updates in range(1, 12):
        for partition in partitions:
            partition.updates = updates
        chosen, version = vectors(source), view.clocks.version
        view.restart_clock(chosen)
        for f, row in zip(chosen.factors, chosen.rows, strict=True):
            births[f][row] = updates
        assert view.updates == updates and view.clocks.version > version
        assert view.clocks.births.tolist() == [0, *np.concatenate(births).tolist()]
    other = OptimizerStateView(factors, partitions, forward_copy(dense), None, masters_sharded=False)
    other.clocks.load(view.clocks.births)
    assert other.clocks.births.tolist() == view.clocks.births.tolist()
    assert other.clocks.births is not view.clocks.births and other.clocks.version == 1


def runs(source: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = int(source.integers(0, 8))
    return source.integers(0, 50, count), source.integers(0, 6, count)


def test_element_index_and_clip_runs() -> None:
    """Against ranges of python; empty runs and an empty list included."""
    source = np.random.default_rng(0)
    for _ in range(300):
        starts, lengths = runs(source)
        expected = [i for start, length in zip(starts, lengths, strict=True) for i in range(start, start + length)]
        assert element_index(starts, lengths, CPU).tolist() == expected
        low, size = source.integers(0, 50, len(starts)), source.integers(0, 30, len(starts))
        skipped, left = clip_runs(starts, lengths, low, size)
        for run in zip(starts, lengths, low, size, skipped, left, strict=True):
            check_clip(*map(int, run))


def check_clip(start: int, length: int, low: int, size: int, skipped: int, left: int) -> None:
    inside: Any = sorted(set(range(start, start + length)) & set(range(low, low + size)))
    assert left == len(inside)
    if inside:
        assert start + skipped == inside[0]
