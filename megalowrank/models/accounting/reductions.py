"""What DeepSpeed and the reduction of partial gradients move in one update: gradients, weights, norm and loss."""

from __future__ import annotations

from collections.abc import Sequence

from megalowrank.config import ModelConfig
from megalowrank.models.accounting.gathers import gathered_by_micro_batch
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.parts import Part
from megalowrank.models.accounting.tally import Tally

_FLOAT = 4
_ZERO_0_BUCKET = 500_000_000


def reduce_partial(tally: Tally, parts: Sequence[Part]) -> None:
    """Gradients that are partial sums: all at once at the end of an update, or each as it arrives."""
    layout = tally.layout
    sizes = [part.numel * layout.low for part in parts if part.partial and part.trained]
    if reduces_once(layout):
        tally.add("tensor", "all-reduce", sum(sizes), calls=int(bool(sizes)))
    else:
        tally.add("tensor", "all-reduce", layout.accumulation * sum(sizes), layout.accumulation * len(sizes))


def reduces_once(layout: Layout) -> bool:
    """Whether the engine leaves gradients alone until the last backward pass of an update is over."""
    return not layout.zero or (layout.zero == 1 and not layout.overlap_comm)


def gather_parameters(tally: Tally, config: ModelConfig, parts: Sequence[Part], blocks: Sequence[int]) -> None:
    """Parameters for forward and backward passes, and the persistent ones after the update, each for itself."""
    layout = tally.layout
    if layout.data_size == 1:
        return
    found = gathered_by_micro_batch(config, parts, blocks, layout)
    calls, elements = layout.accumulation * found.calls, layout.accumulation * found.elements
    tally.add("data", "all-gather", elements * layout.low, calls)
    kept = [_padded(part.numel, layout) for part in parts if part.numel <= layout.persistence_threshold]
    tally.add("data", "all-gather", sum(kept) * layout.low, len(kept))


def _padded(numel: int, layout: Layout) -> int:
    """Elements of all shards of a parameter."""
    return -(-numel // layout.data_size) * layout.data_size


def scatter_gradients(tally: Tally, trained: Sequence[Part]) -> None:
    """Gradients of ZeRO-3, bucket by bucket in every backward pass."""
    layout = tally.layout
    buckets, full = 0, layout.reduce_bucket + 1
    for part in reversed(trained):
        if full + part.numel > layout.reduce_bucket and full > 0:
            buckets, full = buckets + 1, 0
        full += part.numel
    if layout.reduce_scatter:
        collective, numel = "reduce-scatter", sum(_padded(part.numel, layout) for part in trained)
    else:
        collective, numel = "all-reduce", sum(part.numel for part in trained)
    payload = numel * _gradient_size(layout)
    tally.add("data", collective, layout.accumulation * payload, layout.accumulation * buckets)


def _gradient_size(layout: Layout) -> int:
    """Bytes of an element of a gradient that is reduced."""
    return _FLOAT if layout.reduce_fp32 else layout.low


def reduce_gradients(tally: Tally, trained: Sequence[Part]) -> None:
    """Gradients of ZeRO-0 to 2, and the weights that the ranks of ZeRO-1 and 2 updated."""
    layout = tally.layout
    groups = [trained]
    if layout.decay_groups:
        groups = [[part for part in trained if part.vector == vector] for vector in (False, True)]
    passes = layout.accumulation if layout.zero == 2 else 1
    numel = sum(part.numel for part in trained)
    calls, collective = _reductions(layout, groups)
    tally.add("data", collective, passes * numel * _gradient_size(layout), passes * calls)
    for group in groups if layout.zero else ():
        aligned = -(-sum(part.numel for part in group) // (2 * layout.data_size)) * 2 * layout.data_size
        tally.add("data", "all-gather", aligned * layout.low)


def _reductions(layout: Layout, groups: Sequence[Sequence[Part]]) -> tuple[int, str]:
    """(calls of one reduction of all gradients, collective)."""
    if layout.zero == 0:
        calls, full = 0, 0
        for part in (part for group in groups for part in group):
            full += part.numel
            if full > _ZERO_0_BUCKET:
                calls, full = calls + 1, 0
        return calls + (full > 0), "all-reduce"
    buckets: list[list[tuple[int, int]]] = []
    full = layout.reduce_bucket + 1
    order = [part for group in groups for part in group]
    for part, slices in zip(order, _owners(layout, groups), strict=True):
        if full + part.numel > layout.reduce_bucket:
            buckets.append([])
            full = 0
        full += part.numel
        buckets[-1] += slices
    if not layout.reduce_scatter:
        return len(buckets), "all-reduce"
    if not layout.multi_rank_buckets:
        return sum(len({owner for owner, _ in bucket}) for bucket in buckets), "reduce"
    return sum(_flushes(bucket, layout.reduce_bucket) for bucket in buckets), "all-reduce"


def _owners(layout: Layout, groups: Sequence[Sequence[Part]]) -> list[list[tuple[int, int]]]:
    """(owner, elements) of the slices of every parameter, as partitions cut them."""
    found = []
    for group in groups:
        total = sum(part.numel for part in group)
        size, position = -(-total // (2 * layout.data_size)) * 2, 0
        for part in group:
            slices, left = [], part.numel
            while left:
                here = min(left, size - position % size)
                slices.append((position // size, here))
                position, left = position + here, left - here
            found.append(slices)
    return found


def _flushes(slices: Sequence[tuple[int, int]], limit: int) -> int:
    """Calls that reduce the slices of a bucket: neighbours of one owner together, until the limit is passed."""
    joined: list[list[int]] = []
    for owner, numel in slices:
        if joined and joined[-1][0] == owner:
            joined[-1][1] += numel
        else:
            joined.append([owner, numel])
    calls, full = 0, 0
    for _, numel in joined:
        full += numel
        if full > limit:
            calls, full = calls + 1, 0
    return calls + (full > 0)


def reduce_norm_and_loss(tally: Tally, stage: int) -> None:
    """The mean loss, whether gradients are finite, and their norm."""
    layout = tally.layout
    if layout.zero is None:
        return
    if layout.pipe_size == 1 or stage == layout.pipe_size - 1:
        tally.add("data", "all-reduce", _FLOAT)
    if layout.zero == 0:
        tally.add("tensor", "all-reduce", 2 * _FLOAT)
    groups, size = 2 if layout.decay_groups else 1, _FLOAT
    if layout.zero == 3 and not layout.offload_optimizer:
        size = 2 * _FLOAT
    for kind in ("data", "model") if layout.zero else ():
        tally.add(kind, "all-reduce", groups * size, groups)
        tally.add(kind, "all-reduce", 1, calls=int(layout.bf16 and layout.zero != 3))
