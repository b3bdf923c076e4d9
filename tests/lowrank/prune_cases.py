"""Ranks of test_prune: each holds a part of the moments of all factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalowrank.lowrank.prune import MOMENTS, Pruning, prune
from megalowrank.lowrank.state import FlatForwardCopy, FlatPartition, Fragment, OptimizerStateView

SHAPES = [(5, 70), (3, 110), (1, 4), (8, 25), (1, 1)]
TOTAL = sum(rows * columns for rows, columns in SHAPES)
Moments = dict[str, list[torch.Tensor]]


def moments_of(seed: int, ties: bool, dtype: torch.dtype) -> Moments:
    """Moments of every factor; with ``ties`` few distinct values, zeros among them."""
    source = torch.Generator().manual_seed(seed)
    drawn = {name: [torch.randn(shape, generator=source, dtype=torch.float64) for shape in SHAPES] for name in MOMENTS}
    if ties:
        drawn = {name: [values.round() for values in found] for name, found in drawn.items()}
    drawn["exp_avg_sq"] = [values.square() for values in drawn["exp_avg_sq"]]
    return {name: [values.to(dtype) for values in found] for name, found in drawn.items()}


def cuts(world: int) -> list[int]:
    """Where the flat state of all factors is cut: the last rank gets three elements."""
    inner = np.linspace(0, TOTAL - 3, world)[1:].astype(int).tolist()
    return [0, *inner, TOTAL]


def view_of(whole: Moments, rank: int, world: int, dtype: torch.dtype) -> OptimizerStateView:
    """The state view of ``rank``; with several ranks on the default group."""
    edges = cuts(world) if world > 1 else [0, TOTAL]
    begin, end = edges[rank], edges[rank + 1]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    fragments, position = [], 0
    for parameter in parameters:
        first, last = max(begin, position), min(end, position + parameter.numel())
        if first < last:
            fragments.append(Fragment(parameter, first - begin, first - position, last - first))
        position += parameter.numel()
    partition = FlatPartition(torch.zeros(end - begin, dtype=dtype), [], fragments)
    for name in MOMENTS:
        getattr(partition, name).copy_(torch.cat([values.flatten() for values in whole[name]])[begin:end])
    sizes = np.array([rows * columns for rows, columns in SHAPES])
    forward = FlatForwardCopy(torch.zeros(TOTAL, dtype=dtype), np.cumsum(sizes) - sizes)
    group = dist.group.WORLD if world > 1 else None
    return OptimizerStateView(parameters, [partition], forward, group, masters_sharded=world > 1)


def compare(payload: Any) -> list[dict[str, Any]]:
    """Every rule on this rank's part against the same rule on the whole state."""
    rank, world, report = dist.get_rank(), dist.get_world_size(), []
    rules = [Pruning("zero")] + [
        Pruning(how, 0.6, shared) for how in ("random", "magnitude") for shared in (True, False)
    ]
    for rule, ties in [(rule, False) for rule in rules] + [(rules[3], True)]:
        whole = moments_of(4, ties, torch.float32)
        own, single = view_of(whole, rank, world, torch.float32), view_of(whole, 0, 1, torch.float32)
        found, expected = prune(own, rule, 3, 8), prune(single, rule, 3, 8)
        begin, end = cuts(world)[rank : rank + 2]
        equal = all(
            torch.equal(getattr(own.partitions[0], name), getattr(single.partitions[0], name)[begin:end])
            for name in MOMENTS
        )
        report.append({"equal": equal, "shares": found, "expected": expected})
    return report
