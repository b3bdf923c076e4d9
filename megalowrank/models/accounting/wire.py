"""Bytes that the collectives of one update move on a rank, by group and collective, as ``Traffic`` counts them.

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
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import Part, local_sizes, rank_parts
from megalowrank.models.accounting.reductions import (
    gather_parameters,
    reduce_gradients,
    reduce_norm_and_loss,
    reduce_partial,
    scatter_gradients,
)
from megalowrank.models.accounting.shapes import Matrix, Projection, all_projections
from megalowrank.models.accounting.tally import Tally, Volumes
from megalowrank.models.architecture import architecture
from megalowrank.parallel.traffic import Volume

Reads = Callable[[Matrix], tuple[float, float, float]]
Crossing = Callable[[int, int, int, int], float]

_FLOAT = 4


def wire_bytes(
    config: ModelConfig,
    adapters: Adapters | None,
    layout: Layout,
    stage: int = 0,
    reads: Reads | None = None,
    crossing: Crossing | None = None,
) -> Volumes:
    """Calls and bytes of one update on every rank of a pipeline stage, by (group, collective).

    ``reads`` says what a method reads of a matrix before an update, in vectors of A and as many of B: masters, forward
    copies, and vectors that data-parallel ranks keep for one another; on average, or of one update. ``crossing``
    says what a rank receives from other heads for a matrix, of its rank, rows, columns and bytes of an element:
    *heads*, which is not a group that ``Traffic`` sees. Raises ConfigError for bad patterns, and for more stages than
    blocks.
    """
    tally = Tally(layout)
    parts = rank_parts(config, adapters, layout, stage)
    blocks = stage_blocks(config, adapters, layout, stage)
    projections = [p for p in all_projections(config, adapters) if p.block in blocks]
    if reads is not None:
        _method(tally, projections, reads)
    if crossing is not None:
        _cross(tally, projections, crossing)
    for projection in projections:
        _linear(tally, projection, config.hidden_size or 0)
    _ends(tally, config, stage)
    _pipeline(tally, config, parts, stage)
    reduce_partial(tally, parts)
    trained = [part for part in parts if part.trained]
    if layout.zero == 3:
        gather_parameters(tally, config, parts, blocks)
        scatter_gradients(tally, trained)
    elif layout.zero is not None:
        reduce_gradients(tally, trained)
    reduce_norm_and_loss(tally, stage)
    return tally.volumes


def _method(tally: Tally, projections: Iterable[Projection], reads: Reads) -> None:
    """One all-reduce for all matrices of a stage."""
    layout = tally.layout
    wanted = 0.0
    for projection in projections:
        sizes = zip(projection.matrices, local_sizes(projection, layout), strict=True)
        for matrix, (rows, columns) in sizes if projection.adapted else ():
            masters, forward, beside = reads(matrix)
            vectors = beside + masters * layout.sharded + forward * (layout.zero == 3)
            wanted += vectors * (rows + columns)
    tally.add("data", "all-reduce", _FLOAT * wanted, calls=int(wanted > 0))


def _cross(tally: Tally, projections: Iterable[Projection], crossing: Crossing) -> None:
    """What heads exchange for all matrices of a stage, as bytes received per update on average."""
    layout = tally.layout
    adapted = [projection for projection in projections if projection.adapted]
    received = sum(
        crossing(matrix.rank or 0, *size, layout.low)
        for p in adapted for matrix, size in zip(p.matrices, local_sizes(p, layout), strict=True)
    )  # fmt: skip
    if received:
        tally.volumes["heads", "received"] = Volume(1, round(received))


def _linear(tally: Tally, projection: Projection, hidden: int) -> None:
    """The activation collectives of a fused projection; those of the forward pass again where it is recomputed."""
    layout = tally.layout
    riding = projection.adapted and layout.rides(projection.kind)
    width = hidden + projection.width * riding
    forward = layout.accumulation * (2 if layout.recompute else 1)
    if not layout.splits_sequence:
        calls = layout.accumulation if projection.by_rows else forward
        tally.add("tensor", "all-reduce", calls * _activation(layout, width), calls)
        return
    first, second = ("all-gather", "reduce-scatter") if projection.by_rows else ("reduce-scatter", "all-gather")
    tally.add("tensor", first, forward * _activation(layout, width), forward)
    tally.add("tensor", second, layout.accumulation * _activation(layout, width), layout.accumulation)
    if projection.by_rows and not projection.adapted:
        tally.add("tensor", first, layout.accumulation * _activation(layout, hidden), layout.accumulation)


def _activation(layout: Layout, width: int) -> int:
    """Bytes of all tokens of a micro-batch, ``width`` elements each."""
    return layout.tokens * width * layout.low


def _ends(tally: Tally, config: ModelConfig, stage: int) -> None:
    """Word embedding on the first stage; head and the three sums of the cross-entropy on the last one."""
    layout, count = tally.layout, tally.layout.accumulation
    hidden = count * _activation(layout, config.hidden_size or 0)
    if stage == 0:
        tally.add("tensor", "reduce-scatter" if layout.splits_sequence else "all-reduce", hidden, count)
        tally.add("tensor", "all-gather", hidden, count if layout.splits_sequence else 0)
    if stage == layout.pipe_size - 1 and config.num_labels is not None:
        calls = count * layout.splits_sequence
        tally.add("tensor", "all-reduce", calls * layout.micro_batch * config.num_labels * layout.low, calls)
    elif stage == layout.pipe_size - 1:
        tally.add("tensor", "reduce-scatter" if layout.splits_sequence else "all-reduce", hidden, count)
        tally.add("tensor", "all-gather", 2 * hidden, 2 * count if layout.splits_sequence else 0)
        tally.add("tensor", "all-reduce", 3 * count * _FLOAT * layout.tokens, 3 * count)


def _pipeline(tally: Tally, config: ModelConfig, parts: Sequence[Part], stage: int) -> None:
    """Activations and their gradients between neighbours, gradients of a tied embedding, the loss for every stage."""
    layout, last = tally.layout, tally.layout.pipe_size - 1
    if last == 0:
        return
    neighbours = (stage > 0) + (stage < last)
    calls, states = layout.accumulation * neighbours, 2 if any(".shortcut." in part.module for part in parts) else 1
    for collective in ("send", "receive"):
        state = layout.own_tokens * (config.hidden_size or 0) * layout.low
        tally.add("world", collective, calls * states * state, calls)
    if architecture(config).tied_output and stage in (0, last):
        table = next(part.numel for part in parts if part.module == "embedding")
        if last == 1:
            tally.add("pipe", "all-reduce", table * layout.low)
        else:
            tally.volumes["2 ranks", "all-reduce"] = Volume(1, table * layout.low)
    tally.add("pipe", "broadcast", 2 * _FLOAT)
