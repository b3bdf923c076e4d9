"""VectorClockAdamW against torch's AdamW, and against AdamW per vector written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megalowrank.engine.arena import whole_partition
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.lowrank.state import Clocks, FlatPartition, Fragment
from megalowrank.lowrank.vectors import VectorSet

STEPS = 40
SHAPES = [(5, 13), (3, 40), (7,), (1, 1), (33, 3), (130,), (4, 64)]
FACTORS = [0, 1, 4, 6]


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=source)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of very different sizes, some exactly zero."""
    source = torch.Generator().manual_seed(100 + step)
    scales = torch.logspace(-4, 2, len(SHAPES), dtype=torch.float64)
    found = [torch.randn(shape, dtype=torch.float64, generator=source) for shape in SHAPES]
    kept = [(torch.rand(shape, generator=source) > 0.1) for shape in SHAPES]
    return [(g * k * s).to(dtype) for g, k, s in zip(found, kept, scales, strict=True)]


def clocks_of(factors: list[torch.nn.Parameter]) -> Clocks:
    return Clocks(np.array([factor.shape[0] for factor in factors], dtype=np.int64))


def bound(groups: Any, factors: list[torch.nn.Parameter], **options: Any) -> VectorClockAdamW:
    """The optimizer with one partition per group, on the parameters themselves."""
    optimizer = VectorClockAdamW(groups, **options)
    partitions = [whole_partition(group["params"], group["params"]) for group in optimizer.param_groups]
    optimizer.bind(partitions, clocks_of(factors), factors)
    return optimizer


def restarts(step: int) -> VectorSet:
    """A few random vectors of the factors: (factor, row) pairs without repetition."""
    source = np.random.default_rng(step)
    pairs = [(f, row) for f, index in enumerate(FACTORS) for row in range(SHAPES[index][0])]
    chosen = [pairs[i] for i in source.permutation(len(pairs))[: source.integers(0, 6)]]
    factors = np.array([f for f, _ in chosen], dtype=np.int64)
    lengths = np.array([SHAPES[FACTORS[f]][1] for f, _ in chosen], dtype=np.int64)
    return VectorSet(factors, np.array([row for _, row in chosen], dtype=np.int64), lengths)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_without_restarts_it_is_torch_adamw(dtype: torch.dtype, tolerance: float, decay: float) -> None:
    """Two groups of parameters with their own decay, and a learning rate that changes."""
    own, reference = parameters(dtype), parameters(dtype)
    split = [{"params": own[:4], "weight_decay": decay}, {"params": own[4:], "weight_decay": 0.0}]
    same = [{"params": reference[:4], "weight_decay": decay}, {"params": reference[4:], "weight_decay": 0.0}]
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = bound(split, [own[0], own[1]], **options)
    expected = torch.optim.AdamW(same, foreach=False, fused=False, **options)
    for step in range(STEPS):
        for p, q, gradient in zip(own, reference, gradients(step, dtype), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        expected.step()
    start = parameters(dtype)
    for p, q, begin in zip(own, reference, start, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert not torch.equal(p, begin)
    assert [partition.updates for partition in optimizer.partitions] == [STEPS, STEPS]


class VectorAdam:
    """AdamW of one parameter, row by row, each with its own clock; float64."""

    def __init__(self, values: torch.Tensor) -> None:
        self.x = values.detach().double().numpy().reshape(values.shape[0], -1).copy()
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.clock = np.zeros(len(self.x))

    def step(self, gradient: torch.Tensor, lr: float, decay: float) -> None:
        g = gradient.double().numpy().reshape(self.x.shape)
        for row in range(len(self.x)):
            self.clock[row] += 1
            t = self.clock[row]
            self.x[row] *= 1 - lr * decay
            self.m[row] = 0.9 * self.m[row] + 0.1 * g[row]
            self.v[row] = 0.999 * self.v[row] + 0.001 * g[row] ** 2
            update = (self.m[row] / (1 - 0.9**t)) / (np.sqrt(self.v[row] / (1 - 0.999**t)) + 1e-8)
            self.x[row] -= lr * update


def zero_moments(partitions: list[FlatPartition], factors: list[torch.nn.Parameter], vectors: VectorSet) -> None:
    """Element by element."""
    chosen = {}
    for f, row, length in zip(vectors.factors, vectors.rows, vectors.lengths, strict=True):
        chosen.update(dict.fromkeys((id(factors[f]), int(row * length) + i) for i in range(length)))
    for partition in partitions:
        owners = [(id(f.parameter), f.start + i, f.offset + i) for f in partition.fragments for i in range(f.numel)]
        here = [place for owner, element, place in owners if (owner, element) in chosen]
        partition.exp_avg[here] = partition.exp_avg_sq[here] = 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_vector_has_its_own_clock(dtype: torch.dtype, tolerance: float, decay: float) -> None:
    """Restarts at random steps; a restarted vector's next update is its first. Moments of some are kept."""
    own = parameters(dtype)
    factors = [own[index] for index in FACTORS]
    optimizer = bound([{"params": own, "weight_decay": decay}], factors)
    references = [VectorAdam(p if p.dim() == 2 else p[None]) for p in own]
    restarted = 0
    for step in range(STEPS):
        vectors = restarts(step)
        keep = step % 3 == 0
        optimizer.clocks.restart(vectors, optimizer.partitions[0].updates)
        if not keep:
            zero_moments(optimizer.partitions, factors, vectors)
        for f, row in zip(vectors.factors, vectors.rows, strict=True):
            reference = references[FACTORS[f]]
            reference.clock[row] = 0
            if not keep:
                reference.m[row] = reference.v[row] = 0.0
        restarted += len(vectors)
        for p, reference, gradient in zip(own, references, gradients(step, dtype), strict=True):
            p.grad = gradient
            reference.step(gradient, 1e-2, decay)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        for p, reference in zip(own, references, strict=True):
            found = p.detach().double().numpy().reshape(reference.x.shape)
            np.testing.assert_allclose(found, reference.x, rtol=tolerance, atol=tolerance)
    assert restarted > STEPS
    assert {len(set(reference.clock.tolist())) for reference in references} > {1}


def cut(own: list[torch.nn.Parameter], cuts: list[int]) -> list[FlatPartition]:
    """Partitions of the concatenated parameters at these places, as ZeRO makes them."""
    flat = torch.cat([p.detach().reshape(-1) for p in own])
    ends = [*cuts, flat.numel()]
    found = []
    for begin, end in zip([0, *cuts], ends, strict=True):
        fragments, position = [], 0
        for p in own:
            first, last = max(begin, position), min(end, position + p.numel())
            if first < last:
                fragments.append(Fragment(p, first - begin, first - position, last - first))
            position += p.numel()
        part = torch.nn.Parameter(flat[begin:end].clone())
        found.append(FlatPartition(part.data, [(part, 0)], fragments))
    return found


def train_cut(dtype: torch.dtype, cuts: list[int]) -> list[torch.Tensor]:
    """Masters and moments after a run with restarts, put together again."""
    own = parameters(dtype)
    factors = [own[index] for index in FACTORS]
    partitions = cut(own, cuts)
    optimizer = VectorClockAdamW([p.gradients[0][0] for p in partitions], lr=1e-2, weight_decay=0.1)
    optimizer.bind(partitions, clocks_of(factors), factors)
    for step in range(STEPS // 2):
        vectors = restarts(step)
        optimizer.clocks.restart(vectors, step)
        zero_moments(partitions, factors, vectors)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients(step, dtype)])
        sizes = [p.master.numel() for p in partitions]
        for partition, gradient in zip(partitions, flat.split(sizes), strict=True):
            partition.gradients[0][0].grad = gradient
        optimizer.step()
    assert all(partition.updates == STEPS // 2 for partition in partitions)
    return [torch.cat([getattr(p, kind) for p in partitions]) for kind in ("master", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_zero_cuts_does_not_matter(dtype: torch.dtype) -> None:
    """Bit by bit: also inside a vector, and with an empty partition."""
    total = sum(p.numel() for p in parameters(dtype))
    whole = train_cut(dtype, [])
    source = np.random.default_rng(0)
    for pieces in (2, 2, 3, 4, 8, 8, 30):
        cuts = sorted(source.integers(1, total, pieces - 1).tolist())
        for one, many in zip(whole, train_cut(dtype, cuts), strict=True):
            assert torch.equal(one, many), cuts
    for one, many in zip(whole, train_cut(dtype, [7, 7, total]), strict=True):
        assert torch.equal(one, many)


def test_guard_clips_by_the_global_norm_and_skips_what_is_not_finite() -> None:
    own, free = parameters(torch.float64), parameters(torch.float64)
    clipped, plain = bound(own, [own[0]], lr=1e-2, eps=1.0), bound(free, [free[0]], lr=1e-2, eps=1.0)
    clipped.guard, clipped.clip_grad = True, 0.5
    given = gradients(0, torch.float64)
    norm = float(torch.cat([g.reshape(-1) for g in given]).norm())
    for p, q, gradient in zip(own, free, given, strict=True):
        p.grad, q.grad = gradient.clone(), gradient * (0.5 / norm)
    clipped.step()
    plain.step()
    assert norm > 1 and float(clipped.grad_norm) == pytest.approx(norm, rel=1e-12) and clipped.step_applied
    for p, q in zip(own, free, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    before = [p.detach().clone() for p in own]
    for bad in (torch.nan, torch.inf, -torch.inf):
        own[2].grad[3] = bad
        clipped.step()
        assert not clipped.step_applied and clipped.partitions[0].updates == 1
        assert all(torch.equal(p, old) for p, old in zip(own, before, strict=True))
    own[2].grad[3] = 0.0
    clipped.step()
    assert clipped.step_applied and clipped.partitions[0].updates == 2
    assert not torch.equal(own[2], before[2])


def test_a_missing_gradient_counts_as_zero() -> None:
    first, second = parameters(torch.float64), parameters(torch.float64)
    for own, last in ((first, None), (second, torch.zeros_like(second[-1]))):
        optimizer = bound(own, [own[0]], lr=1e-2, weight_decay=0.1)
        for step in range(3):
            for p, gradient in zip(own, gradients(step, torch.float64), strict=True):
                p.grad = gradient
            own[-1].grad = last
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_takes_no_step_before_it_is_bound() -> None:
    own = parameters(torch.float32)
    optimizer = VectorClockAdamW(own, lr=1.0)
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(own, parameters(torch.float32), strict=True))


def test_loaded_state_is_used_after_runs_are_forgotten() -> None:
    """What a resume does: clocks, moments and the number of updates are written from outside."""
    source, target = parameters(torch.float64), parameters(torch.float64)
    first, second = (bound(own, [own[i] for i in FACTORS], lr=1e-2) for own in (source, target))
    advance(second, target, 0)
    for step in range(6):
        if step == 3:
            assert not torch.equal(source[0], target[0])
            copy_state(first, second)
        first.clocks.restart(restarts(step), step)
        advance(first, source, step)
        if step >= 3:
            second.clocks.restart(restarts(step), step)
            advance(second, target, step)
            assert all(torch.equal(p, q) for p, q in zip(source, target, strict=True)), step


def advance(optimizer: VectorClockAdamW, own: list[torch.nn.Parameter], step: int) -> None:
    for p, gradient in zip(own, gradients(step, torch.float64), strict=True):
        p.grad = gradient
    optimizer.step()


def copy_state(source: VectorClockAdamW, target: VectorClockAdamW) -> None:
    target.clocks.load(source.clocks.births)
    for mine, other in zip(target.partitions, source.partitions, strict=True):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            getattr(mine, kind).copy_(getattr(other, kind))
        mine.updates = other.updates
    target.forget_runs()
