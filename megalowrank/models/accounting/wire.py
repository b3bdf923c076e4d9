"""Bytes that the collectives of one update move on a rank, by group and collective, as ``parallel.traffic`` counts them.

The payload of a call is its larger side: the tensor of an all-reduce, the result of an all-gather, the input of a
reduce-scatter. Bytes are exact for an update in the steady state (the first two record the order of modules under
ZeRO-3, and exchange shapes in a pipeline); so are calls, except that gradients of ZeRO-2 and 3 are assumed to arrive
in the reverse order of the modules where they fill more than one bucket. Comparisons of replicas, evaluations, log
lines and checkpoints are not part of an update.

Groups are named as ``parallel.groups.Groups.labels`` does: tensor, data, pipe, stage (the ranks of one), world, and
*model* for the tensor-parallel ranks of all stages. Where two have the same ranks there is one name; groups of one
rank are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.gathers import gathered_by_micro_batch
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import Part, local_sizes, rank_parts
from megalowrank.models.accounting.shapes import Matrix, Projection, all_projections
from megalowrank.models.architecture import architecture
from megalowrank.parallel.traffic import Volume

Volumes = dict[tuple[str, str], Volume]
Reads = Callable[[Matrix], tuple[float, float, float]]

_FLOAT = 4
_ZERO_0_BUCKET = 500_000_000
_AXES = {"world": "tdp", "model": "tp", "stage": "td", "pipe": "p", "data": "d", "tensor": "t"}
_LABELS = {"tdp": "world", "tp": "model", "td": "stage", "p": "pipe", "d": "data", "t": "tensor"}


def group_name(kind: str, layout: Layout) -> str | None:
    """What a count calls the group ``kind`` (world, model, stage, pipe, data or tensor); None for a single rank."""
    sizes = {"t": layout.tensor_size, "d": layout.data_size, "p": layout.pipe_size}
    real = "".join(axis for axis in _AXES[kind] if sizes[axis] > 1)
    if not real:
        return None
    everything = "".join(axis for axis in "tdp" if sizes[axis] > 1)
    if len(real) == 2 and real == everything:
        return "stage" if real == "td" else "world"
    return _LABELS.get(real, "world")


class _Tally:
    """Volumes of one rank."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.volumes = layout, {}

    volumes: Volumes

    def add(self, kind: str, collective: str, payload: float, calls: int = 1) -> None:
        """``calls`` of a collective that move ``payload`` bytes in all."""
        group = group_name(kind, self.layout)
        if group is None or not calls:
            return
        volume = self.volumes.setdefault((group, collective), Volume())
        volume.calls, volume.payload = volume.calls + calls, volume.payload + round(payload)


def wire_bytes(
    config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int = 0, reads: Reads | None = None
) -> Volumes:
    """Calls and bytes of one update on every rank of a pipeline stage, by (group, collective).

    ``reads`` says what a method reads of a matrix before an update, in vectors of A and as many of B: masters, forward
    copies, and vectors that data-parallel ranks keep for one another; on average, or of one update. Raises
    ConfigError for bad patterns, and for more stages than blocks.
    """
    tally = _Tally(layout)
    parts = rank_parts(config, adapters, layout, stage)
    blocks = stage_blocks(config, adapters, layout, stage)
    projections = [p for p in all_projections(config, adapters) if p.block in blocks]
    if reads is not None:
        _method(tally, projections, reads)
    for projection in projections:
        _linear(tally, projection, config.hidden_size or 0)
    _ends(tally, config, stage)
    _pipeline(tally, config, parts, stage)
    _partial_gradients(tally, parts)
    trained = [part for part in parts if part.trained]
    if layout.zero == 3:
        _gather_parameters(tally, config, parts, blocks)
        _scatter_gradients(tally, trained)
    elif layout.zero is not None:
        _reduce_gradients(tally, trained)
    _norm_and_loss(tally, stage)
    return tally.volumes


def _method(tally: _Tally, projections: Iterable[Projection], reads: Reads) -> None:
    """One all-reduce for all matrices of a stage."""
    layout = tally.layout
    wanted = 0.0
    for projection in projections:
        sizes = zip(projection.matrices, local_sizes(projection, layout), strict=True)
        for matrix, (rows, columns) in sizes if projection.rank is not None else ():
            masters, forward, beside = reads(matrix)
            vectors = beside + masters * layout.sharded + forward * (layout.zero == 3)
            wanted += vectors * (rows + columns)
    tally.add("data", "all-reduce", _FLOAT * wanted, calls=int(wanted > 0))


def _linear(tally: _Tally, projection: Projection, hidden: int) -> None:
    """The activation collectives of a fused projection; those of the forward pass again where it is recomputed."""
    layout = tally.layout
    riding = projection.rank is not None and layout.rides(projection.kind)
    width = hidden + (projection.rank or 0) * len(projection.matrices) * riding
    forward = layout.accumulation * (2 if layout.recompute else 1)
    if not layout.splits_sequence:
        calls = layout.accumulation if projection.by_rows else forward
        tally.add("tensor", "all-reduce", calls * _activation(layout, width), calls)
        return
    first, second = ("all-gather", "reduce-scatter") if projection.by_rows else ("reduce-scatter", "all-gather")
    tally.add("tensor", first, forward * _activation(layout, width), forward)
    tally.add("tensor", second, layout.accumulation * _activation(layout, width), layout.accumulation)
    if projection.by_rows and projection.rank is None:
        tally.add("tensor", first, layout.accumulation * _activation(layout, hidden), layout.accumulation)


def _activation(layout: Layout, width: int) -> int:
    """Bytes of all tokens of a micro-batch, ``width`` elements each."""
    return layout.tokens * width * layout.low


def _ends(tally: _Tally, config: ModelConfig, stage: int) -> None:
    """Word embedding on the first stage; head and the three sums of the cross-entropy on the last one."""
    layout, count = tally.layout, tally.layout.accumulation
    hidden = count * _activation(layout, config.hidden_size or 0)
    if stage == 0:
        tally.add("tensor", "reduce-scatter" if layout.splits_sequence else "all-reduce", hidden, count)
        tally.add("tensor", "all-gather", hidden, count if layout.splits_sequence else 0)
    if stage == layout.pipe_size - 1:
        tally.add("tensor", "reduce-scatter" if layout.splits_sequence else "all-reduce", hidden, count)
        tally.add("tensor", "all-gather", 2 * hidden, 2 * count if layout.splits_sequence else 0)
        tally.add("tensor", "all-reduce", 3 * count * _FLOAT * layout.tokens, 3 * count)


def _pipeline(tally: _Tally, config: ModelConfig, parts: Sequence[Part], stage: int) -> None:
    """Activations and their gradients between neighbours, gradients of a tied embedding, the loss for every stage."""
    layout, last = tally.layout, tally.layout.pipe_size - 1
    if last == 0:
        return
    neighbours = (stage > 0) + (stage < last)
    calls = layout.accumulation * neighbours
    for collective in ("send", "receive"):
        tally.add("world", collective, calls * layout.own_tokens * (config.hidden_size or 0) * layout.low, calls)
    if architecture(config).tied_output and stage in (0, last):
        table = next(part.numel for part in parts if part.module == "embedding")
        if last == 1:
            tally.add("pipe", "all-reduce", table * layout.low)
        else:
            tally.volumes["2 ranks", "all-reduce"] = Volume(1, table * layout.low)
    tally.add("pipe", "broadcast", 2 * _FLOAT)


def _partial_gradients(tally: _Tally, parts: Sequence[Part]) -> None:
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


def _gather_parameters(tally: _Tally, config: ModelConfig, parts: Sequence[Part], blocks: Sequence[int]) -> None:
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


def _scatter_gradients(tally: _Tally, trained: Sequence[Part]) -> None:
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


def _reduce_gradients(tally: _Tally, trained: Sequence[Part]) -> None:
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
    order = [(g, part) for g, group in enumerate(groups) for part in group]
    buckets: list[list[tuple[int, int]]] = []
    full = layout.reduce_bucket + 1
    owners = _owners(layout, groups)
    for (g, part), slices in zip(order, owners, strict=True):
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
    """Calls in which the slices of a bucket are reduced: neighbours of one owner together, until the limit is passed."""
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


def _norm_and_loss(tally: _Tally, stage: int) -> None:
    """The mean loss, whether gradients are finite, and their norm."""
    layout = tally.layout
    if layout.zero is None:
        return
    if layout.pipe_size == 1 or stage == layout.pipe_size - 1:
        tally.add("data", "all-reduce", _FLOAT)
    if layout.zero == 0:
        tally.add("tensor", "all-reduce", _FLOAT)
    groups, size = 2 if layout.decay_groups else 1, _FLOAT
    if layout.zero == 3 and not layout.offload_optimizer:
        size = 2 * _FLOAT
    for kind in ("data", "model") if layout.zero else ():
        tally.add(kind, "all-reduce", groups * size, groups)
        tally.add(kind, "all-reduce", 1, calls=int(layout.bf16 and layout.zero != 3))
