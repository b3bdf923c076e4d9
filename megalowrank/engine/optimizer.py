"""AdamW with one clock per vector, at the speed of torch's fused kernel.

Consecutive vectors that were born at the same update form a *run*; torch's fused AdamW kernel updates all
runs of a flat partition in one call, each with its own step (the kernel itself, because the function around it
costs a multiple of the kernel for hundreds of runs). Without restarts a partition is one run.

Source: AdamW, Loshchilov and Hutter 2019, alg. 2; the clock of a vector is updates - birth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megalowrank.lowrank.state import Clocks, FlatPartition, Fragment
from megalowrank.lowrank.vectors import element_index

_LANES = 16
_FEW_VECTORS = 8192


@dataclass
class _Runs:
    """The cut of a partition for one version of the clocks.

    ``sizes`` of consecutive stretches that cover it, ``keep`` those updated in place (None: all), ``ages`` the
    updates that each run has behind it and ``steps`` views of them, one for every stretch in ``keep``;
    ``state`` are the kept stretches of master, exp_avg and exp_avg_sq. ``clock`` is set where every vector is a
    run of its own, so that a restart changes nothing but ages. Runs that are held are in no list.
    """

    version: int
    holds: int
    sizes: list[int]
    keep: list[int] | None
    ages: torch.Tensor
    steps: list[torch.Tensor]
    tails: _Tails | None
    clock: np.ndarray | None
    state: list[list[torch.Tensor]] = field(default_factory=list)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The stretches of a flat tensor that are updated in place."""
        pieces = flat.split(self.sizes)
        return list(pieces) if self.keep is None else [pieces[i] for i in self.keep]


class _Tails:
    """The last elements of runs whose length is no multiple of the vector width, in padded scratch memory.

    torch's CPU kernel rounds the scalar rest of a run differently from its vectorised body. Padded, every
    element takes the vectorised path, so that the result does not depend on where ZeRO cuts a tensor.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, steps: list[torch.Tensor], like: torch.Tensor) -> None:
        rest = sizes % _LANES
        chosen = np.flatnonzero(rest)
        self.here = element_index((starts + sizes - rest)[chosen], rest[chosen], like.device)
        self.there = element_index(np.arange(len(chosen)) * _LANES, rest[chosen], like.device)
        self.steps = [steps[i] for i in chosen.tolist()]
        self.scratch = [like.new_zeros(len(chosen) * _LANES) for _ in range(4)]

    def load(self, flats: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Padded copies of the tails of master, gradient, exp_avg and exp_avg_sq."""
        for scratch, flat in zip(self.scratch, flats, strict=True):
            scratch.index_copy_(0, self.there, flat.index_select(0, self.here))
        return [list(scratch.split(_LANES)) for scratch in self.scratch]

    def store(self, master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        """Write the updated tails back."""
        for flat, scratch in zip((master, exp_avg, exp_avg_sq), (self.scratch[i] for i in (0, 2, 3)), strict=True):
            flat.index_copy_(0, self.here, scratch.index_select(0, self.there))


def gradients_of(owners: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of those of ``owners`` that have one."""
    return [p.grad for p in owners if p.grad is not None]


def norm_of_all(owners: list[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of the gradients of ``owners``, which are all there are."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients_of(owners))))


class VectorClockAdamW(torch.optim.Optimizer):
    """A client optimizer for DeepSpeed, and a plain one.

    Until ``bind`` it takes no step (DeepSpeed steps once with zero gradients while it builds some of
    its optimizers). With ``guard`` it computes the global norm itself (``norm_over`` says how, where other ranks hold
    other gradients), clips to ``clip_grad`` and skips an update whose norm is not finite; otherwise the engine around
    it does so.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.partitions: list[FlatPartition] = []
        self.guard, self.clip_grad = False, 0.0
        self.norm_over: Callable[[list[torch.nn.Parameter]], torch.Tensor] = norm_of_all
        self.grad_norm: torch.Tensor | None = None
        self.step_applied = True
        self._runs: dict[int, _Runs] = {}

    def bind(self, partitions: list[FlatPartition], clocks: Clocks, factors: list[torch.nn.Parameter]) -> None:
        """Say where masters and moments lie and which clock each vector has."""
        self.partitions, self.clocks = partitions, clocks
        index = {id(parameter): f for f, parameter in enumerate(factors)}
        self._segments = [_segments(partition, clocks, index) for partition in partitions]
        self._of = {id(t): i for i, partition in enumerate(partitions) for t, _ in partition.gradients}
        self._runs.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every partition that the current ``param_groups`` name."""
        if self.guard and not self._norm_is_finite():
            return
        done: set[int] = set()
        for group in self.param_groups:
            for tensor in group["params"]:
                index = self._of.get(id(tensor)) if self.partitions else None
                if index is not None and index not in done:
                    done.add(index)
                    self._update(index, group)

    def _norm_is_finite(self) -> bool:
        owners = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = gradients_of(owners)
        norm = self.norm_over(owners)
        self.grad_norm = norm
        self.step_applied = bool(torch.isfinite(norm).item())
        if self.step_applied and self.clip_grad > 0:
            torch._foreach_mul_(grads, torch.clamp(self.clip_grad / (norm + 1e-6), max=1.0))
        return self.step_applied

    def _update(self, index: int, group: dict[str, Any]) -> None:
        partition = self.partitions[index]
        if not partition.master.numel():
            partition.updates += 1
            return
        runs = self._runs_of(index)
        gradient = _flat_gradient(partition)
        lists = [runs.state[0], runs.views(gradient), runs.state[1], runs.state[2]]
        steps = runs.steps
        if runs.tails is not None:
            flats = (partition.master, gradient, partition.exp_avg, partition.exp_avg_sq)
            lists = [views + padded for views, padded in zip(lists, runs.tails.load(flats), strict=True)]
            steps = steps + runs.tails.steps
        runs.ages += 1
        if not steps:
            partition.updates += 1
            return
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            lists[0], lists[1], lists[2], lists[3], [], steps,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if runs.tails is not None:
            runs.tails.store(partition.master, partition.exp_avg, partition.exp_avg_sq)
        partition.updates += 1

    def _runs_of(self, index: int) -> _Runs:
        """The runs of a partition, cut again only after a clock was restarted."""
        cached = self._runs.get(index)
        alike = cached is not None and cached.holds == self.clocks.holds
        if alike and cached is not None and cached.version == self.clocks.version:
            return cached
        partition = self.partitions[index]
        if alike and cached is not None and cached.clock is not None:
            ages = partition.updates - self.clocks.births[cached.clock]
            cached.ages.copy_(torch.from_numpy(ages))
            cached.version = self.clocks.version
            return cached
        runs = cut_runs(partition, self._segments[index], self.clocks)
        runs.state = [runs.views(flat) for flat in (partition.master, partition.exp_avg, partition.exp_avg_sq)]
        self._runs[index] = runs
        return runs

    def forget_runs(self) -> None:
        """Cut runs anew: call it after loading moments, clocks or the number of updates."""
        self._runs.clear()


def cut_runs(partition: FlatPartition, segments: tuple[np.ndarray, np.ndarray], clocks: Clocks) -> _Runs:
    """Join consecutive vectors that were born at the same update.

    Where vectors are few and clocks are restarted, every vector is a run for good: cutting anew at every restart
    would cost more than the longer list does.
    """
    starts, clock = segments
    births, held = clocks.births[clock], clocks.held[clock]
    separate = clocks.version > 0 and len(starts) <= _FEW_VECTORS
    changes = (births[1:] != births[:-1]) | (held[1:] != held[:-1])
    cut = np.arange(1, len(starts)) if separate else np.flatnonzero(changes) + 1
    first = np.append(0, cut)
    live = ~held[first]
    sizes = np.diff(np.append(starts[first], partition.master.numel()))
    device = partition.master.device
    ages = torch.tensor(partition.updates - births[first], dtype=torch.float32).to(device)
    steps = list(ages.unbind())
    rest = sizes % _LANES if device.type == "cpu" else np.zeros_like(sizes)
    stretches = np.stack((sizes - rest, rest), axis=1).reshape(-1)
    body = np.flatnonzero((sizes > rest) & live)
    position = np.cumsum(stretches > 0) - 1
    cut_off, begin = rest[live].any(), starts[first][live]
    live_steps = [steps[i] for i in np.flatnonzero(live).tolist()]
    return _Runs(
        version=clocks.version,
        holds=clocks.holds,
        sizes=stretches[stretches > 0].tolist(),
        keep=position[2 * body].tolist() if rest.any() or not live.all() else None,
        ages=ages,
        steps=[steps[i] for i in body.tolist()],
        tails=_Tails(begin, sizes[live], live_steps, partition.master) if cut_off else None,
        clock=clock if separate else None,
    )


def _flat_gradient(partition: FlatPartition) -> torch.Tensor:
    """The gradient of a partition as one 1-D tensor; a copy where it lies in several."""
    owners = [owner for owner, _ in partition.gradients]
    found = [owner.grad if owner.grad is not None else torch.zeros_like(owner) for owner in owners]
    flat = found[0].reshape(-1) if len(found) == 1 else torch.cat([gradient.reshape(-1) for gradient in found])
    return flat.to(partition.master.dtype)


def _segments(partition: FlatPartition, clocks: Clocks, index: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Start and clock of every vector and every other stretch of a partition."""
    starts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    clock: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    for fragment in sorted(partition.fragments, key=lambda f: f.offset):
        begin, number = _vectors_of(fragment, clocks, index)
        starts += [begin, np.array([fragment.offset + fragment.numel])]
        clock += [number, np.zeros(1, dtype=np.int64)]
    all_starts, all_clocks = np.concatenate(starts), np.concatenate(clock)
    keep = np.append(all_starts[1:] > all_starts[:-1], all_starts[-1] < partition.master.numel())
    return all_starts[keep], all_clocks[keep]


def _vectors_of(fragment: Fragment, clocks: Clocks, index: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Offset and clock of each (part of a) vector in a fragment; one stretch if it is not a factor."""
    factor = index.get(id(fragment.parameter))
    if factor is None:
        return np.array([fragment.offset]), np.zeros(1, dtype=np.int64)
    length = getattr(fragment.parameter, "ds_shape", fragment.parameter.shape)[1]
    rows = np.arange(fragment.start // length, (fragment.start + fragment.numel - 1) // length + 1)
    begin = fragment.offset + np.maximum(rows * length - fragment.start, 0)
    return begin, clocks.first[factor] + rows
