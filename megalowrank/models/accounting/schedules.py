"""Ride or partial: which schedule of low-rank products costs less, projection by projection.

Per update and rank, in bytes on the links of a tensor-parallel group of t ranks, all times (t - 1) / t: an all-reduce
moves its payload twice, an all-gather or reduce-scatter once. N tokens a micro-batch, m micro-batches, H hidden, R the
sum of a projection's ranks, e bytes an element; ``again`` is 1 where the forward pass is recomputed.

| sequence | ride                              | partial                                                    |
|----------|-----------------------------------|------------------------------------------------------------|
| whole    | 2·e·N·R·m, for rows ·(1 + again)  | 2·e·R·H once, or m times and a call for every matrix       |
| split    | (2 + again)·e·N·R·m               | (3 + again)·2·N·R·H·m operations that ride divides by t    |

A replicated factor that is not trained has no gradient: R counts those that are, in *partial* with a whole sequence and
in one of the products with a split one. With a whole sequence both do the same arithmetic; with a split one both reduce
the same gradients. Operations become bytes by ``OPERATIONS_PER_BYTE``: an A100 computes 312e12 and sends 300e9 bytes a
second to its neighbours, an H100 989e12 and 450e9, which are about 1000 and 2200; narrow products reach half of that. A
call costs ``CALL_BYTES``.
"""

from __future__ import annotations

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.reductions import reduces_once
from megalowrank.models.accounting.shapes import Projection, all_projections
from megalowrank.models.projections import projections

OPERATIONS_PER_BYTE = 1000
CALL_BYTES = 1 << 20


def choose_schedules(config: ModelConfig, adapters: Adapters | None, layout: Layout) -> dict[str, str]:
    """ride or partial for every fused projection of a block, by name; ride where it makes no difference.

    Layout's own ``schedules`` are not read. Every rank gets the same answer. Raises ConfigError for bad patterns.
    """
    chosen = dict.fromkeys(projections(config), "ride")
    if layout.tensor_size == 1:
        return chosen
    for projection in all_projections(config, adapters):
        if projection.adapted:
            ride, partial = schedule_costs(config, projection, layout)
            chosen[projection.kind] = "partial" if partial < ride else "ride"
    return chosen


def schedule_costs(config: ModelConfig, projection: Projection, layout: Layout) -> tuple[float, float]:
    """(cost of ride, cost of partial) of an adapted projection per update, in bytes."""
    hidden, tokens = config.hidden_size or 0, layout.tokens * layout.accumulation
    width, again = projection.width, int(layout.recompute)
    reduced = [matrix for matrix in projection.matrices if matrix.trained[0 if projection.by_rows else 1]]
    if layout.splits_sequence:
        ride = (2 + again) * layout.low * tokens * width
        products = (2 + again) * width + sum(matrix.width for matrix in reduced)
        return ride, products * 2 * tokens * hidden / OPERATIONS_PER_BYTE
    ride = 2 * layout.low * tokens * width * (1 if projection.by_rows else 1 + again)
    gradient = 2 * layout.low * hidden * sum(matrix.rank or 0 for matrix in reduced)
    if reduces_once(layout):
        return ride, gradient
    return ride, layout.accumulation * (gradient + len(reduced) * CALL_BYTES)
