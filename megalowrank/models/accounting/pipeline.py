"""FLOPs of a rank per update, and the time that the stages of a pipeline wait for one another."""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.flops import factor_gradients
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import local_sizes
from megalowrank.models.accounting.shapes import Projection, all_projections, head_rows


@dataclass(frozen=True)
class Pipeline:
    """``flops`` of an update on a rank of every stage; ``bubble``: idle time over busy time of the busiest stage.

    ``idle`` is the share of an update that every stage waits.
    """

    flops: tuple[float, ...]
    bubble: float
    idle: tuple[float, ...]


def pipeline_of(config: ModelConfig, adapters: Adapters | None, layout: Layout) -> Pipeline:
    """What an update costs on every stage.

    In 1F1B order the first micro-batch passes all stages, and the others follow at the pace of the dearest:
    Σ c + (m - 1) · max c for costs c of a micro-batch. With p equal stages the bubble is (p - 1) / m.
    """
    flops = [rank_flops(config, adapters, layout, stage) for stage in range(layout.pipe_size)]
    count = max(layout.accumulation, 1)
    total = sum(flops) / count + (count - 1) * max(flops) / count
    bubble = total / max(flops) - 1 if total else 0.0
    return Pipeline(tuple(flops), bubble, tuple(1 - own / total if total else 0.0 for own in flops))


def rank_flops(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int = 0) -> float:
    """FLOPs of one update on a rank of a pipeline stage: as ``flops_breakdown``, with padding and what is repeated.

    A product with the replicated factor is repeated on every tensor-parallel rank, unless it rides under sequence
    parallelism, where each rank has its own tokens.
    """
    blocks, again = stage_blocks(config, adapters, layout, stage), int(layout.recompute)
    tokens = layout.tokens * layout.accumulation
    per_token = 0.0
    for projection in all_projections(config, adapters):
        if projection.block in blocks:
            per_token += _linear(projection, layout, again)
    width = (config.hidden_size or 0) // layout.tensor_size
    per_token += len(blocks) * (3 + again) * 2.0 * layout.seq_length * width
    if stage == layout.pipe_size - 1:
        whole = config.num_labels is not None and layout.splits_sequence
        share_of_tokens = layout.tensor_size if whole else 1
        per_token += 6.0 * head_rows(config, layout.tensor_size) * (config.hidden_size or 0) / share_of_tokens
    return tokens * per_token


def _linear(projection: Projection, layout: Layout, again: int) -> float:
    """FLOPs per token of a fused projection; torch does not repeat a plain down projection that sends nothing."""
    sizes = local_sizes(projection, layout)
    weight = 2.0 * sum(rows * columns for rows, columns in sizes)
    if not projection.adapted:
        ends = projection.kind == "mlp.down" and layout.tensor_size == 1
        return weight * (3 + again * (not ends))
    share_of_tokens = layout.tensor_size if layout.splits_sequence and layout.rides(projection.kind) else 1
    narrow = 0.0
    for matrix, (rows, columns) in zip(projection.matrices, sizes, strict=True):
        worked = (rows, columns / share_of_tokens) if projection.by_rows else (rows / share_of_tokens, columns)
        narrow += 2.0 * matrix.width * sum(worked) * (2 + again) + factor_gradients(matrix, *worked)
    return weight * (2 + again) + narrow
