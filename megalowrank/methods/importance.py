"""How much a module matters: scores of adapted matrices and shortcuts, from probe passes.

Each score is a function of a context and of batches (the micro-batches of this rank, global batch by global batch)
to the scores of this stage's modules. Every rank calls it alike; what it returns is that of the whole model and data:
gradients are summed over batches, averaged over micro-batches and data-parallel ranks, and complete over
tensor-parallel ones before a norm or an absolute value is taken. Weights, gradients, optimizer, schedule and random
generators are as before afterwards.

Sources: GRAD-NORM and CONSTANT as HeteroLoRA has them (Zhang et al. 2024); SNIP, Lee et al. 2019, with the masks on A
and B; SynFlow, Tanaka et al. 2020, with the task's loss as R; ALPHA-TEST after Zhou et al. 2021 as HeteroLoRA has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megalowrank.lowrank.factors import LowRankFactors, probed_weights
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.base import Context

Batches = Sequence[Sequence[torch.Tensor]]
Pair = tuple[torch.Tensor, torch.Tensor]
TOLERANCE = 0.01
STEPS = 10


@dataclass(frozen=True)
class Score:
    """``of`` computes it; ``needs_B``: it is 0 for every module while B is 0."""

    of: Callable[[Context, Batches], list[float]]
    needs_B: bool = False


def constant(ctx: Context, batches: Batches) -> list[float]:
    """1 for all, so that chance decides."""
    return [1.0] * len(ctx.layers)


def grad_norm(ctx: Context, batches: Batches) -> list[float]:
    """‖∂L/∂A‖ + ‖∂L/∂B‖, Frobenius."""
    found = gradients(ctx, batches, values(ctx))
    return _totals(ctx, [(a.square(), b.square()) for a, b in found]).sqrt().sum(1).tolist()


def snip(ctx: Context, batches: Batches) -> list[float]:
    """Σ|A ⊙ ∂L/∂A| + Σ|B ⊙ ∂L/∂B|."""
    return _sensitivity(ctx, batches, values(ctx))


def synflow(ctx: Context, batches: Batches) -> list[float]:
    """Σ|A ⊙ ∂R/∂A| + Σ|B ⊙ ∂R/∂B| with R the loss where all weights are positive and all words are ones."""
    if ctx.engine is None:
        raise RuntimeError("this context has no engine to probe")
    current = [(A.abs(), Bt.abs()) for A, Bt in values(ctx)]
    with ctx.engine.unsigned():
        return _sensitivity(ctx, batches, current)


def alpha_test(ctx: Context, batches: Batches) -> list[float]:
    """The smallest of 0 .. 10 tenths of a module's scale with which perplexity stays within 1 % of what it is."""
    limit = ctx.loss(batches) + math.log1p(TOLERANCE)
    if not math.isfinite(limit):
        return [math.nan] * len(ctx.layers)
    own = {layer.index: layer for layer in ctx.layers}
    scores = {index: _smallest(ctx, batches, own.get(index), limit) for index in range(len(ctx.names))}
    return [float(scores[layer.index]) for layer in ctx.layers]


SCORES = {
    "constant": Score(constant),
    "grad-norm": Score(grad_norm),
    "snip": Score(snip, needs_B=True),
    "synflow": Score(synflow, needs_B=True),
    "alpha-test": Score(alpha_test, needs_B=True),
}


def over_stages(ctx: Context, scores: Sequence[float]) -> list[float]:
    """The scores of all modules of the model by global index, on every rank."""
    found = torch.zeros(len(ctx.names), dtype=torch.float64)
    for layer, score in zip(ctx.layers, scores, strict=True):
        found[layer.index] = score
    return ctx.state.sum_over_stages(found).tolist()


def sizes_of_B(ctx: Context) -> list[float]:
    """Σ|B| of all modules of the model by global index, on every rank; exactly 0 where B is."""
    sums = _totals(ctx, [(torch.zeros_like(A), Bt.abs()) for A, Bt in values(ctx)])
    return over_stages(ctx, sums.sum(1).tolist())


def gradients(ctx: Context, batches: Batches, current: Sequence[Pair]) -> list[Pair]:
    """∂L/∂A [r, in] and ∂L/∂Bᵀ [r, out] of every module, this rank's parts, complete; from those of W.

    ``current``: A and Bᵀ as the forward pass sees them.
    """
    weights = probed_weights(ctx.layers)
    found, count = [(torch.zeros_like(A), torch.zeros_like(Bt)) for A, Bt in current], 1

    def take(i: int, gradient: torch.Tensor) -> None:
        for j, layer in enumerate(ctx.layers):
            if layer.weight is weights[i]:
                own = gradient[layer.row_start : layer.row_start + layer.rows.padded].to(ctx.state.dtype)
                found[j][0].addmm_(current[j][1], own, alpha=layer.taking_part / count)
                found[j][1].addmm_(current[j][0], own.t(), alpha=layer.taking_part / count)

    for batch in batches:
        count = len(batch)
        for micro_batch in batch:
            ctx.probe(weights, take, [micro_batch])
    return _complete(ctx, found)


def values(ctx: Context) -> list[Pair]:
    """A [r, in] and Bᵀ [r, out] of every module as the forward pass sees them, this rank's parts."""
    lengths = [length for layer in ctx.layers for length in (layer.columns.padded, layer.rows.padded)]
    ranks = [layer.rank for layer in ctx.layers for _ in range(2)]
    vectors, none = VectorSet.whole(list(range(len(ranks))), ranks, lengths), VectorSet.whole([], [], [])
    beside = torch.empty(0, dtype=ctx.state.dtype, device=ctx.state.device)
    _, packed, _ = ctx.state.read(none, vectors, beside)
    return _pairs(ctx.layers, packed)


def _sensitivity(ctx: Context, batches: Batches, current: Sequence[Pair]) -> list[float]:
    pairs = zip(current, gradients(ctx, batches, current), strict=True)
    return _totals(ctx, [((A * a).abs(), (Bt * b).abs()) for (A, Bt), (a, b) in pairs]).sum(1).tolist()


def _pairs(layers: Sequence[LowRankFactors], packed: torch.Tensor) -> list[Pair]:
    sizes = [layer.rank * length.padded for layer in layers for length in (layer.columns, layer.rows)]
    parts = iter(packed.split(sizes))
    return [(next(parts).view(layer.rank, -1), next(parts).view(layer.rank, -1)) for layer in layers]


def _complete(ctx: Context, found: list[Pair]) -> list[Pair]:
    """Sum the partial ones over tensor-parallel ranks, and average all over data-parallel ranks: two collectives."""
    partial = [part for layer, pair in zip(ctx.layers, found, strict=True) for part in layer.partial(*pair)]
    if partial:
        sizes = [part.numel() for part in partial]
        summed = ctx.state.sum_over_tensor_ranks(torch.cat([part.reshape(-1) for part in partial]))
        for part, total in zip(partial, summed.split(sizes), strict=True):
            part.copy_(total.view_as(part))
    if not found:
        return found
    flat = torch.cat([part.reshape(-1) for pair in found for part in pair])
    return _pairs(ctx.layers, ctx.state.mean_over_data_ranks(flat))


def _totals(ctx: Context, parts: Sequence[Pair]) -> torch.Tensor:
    """Sums over all elements of A and of B [modules, 2], what tensor-parallel ranks share counted once."""
    places = ctx.state.places
    found = torch.tensor(
        [
            [float(part.double().sum()) * places[2 * j + side].counted for side, part in enumerate(pair)]
            for j, pair in enumerate(parts)
        ],
        dtype=torch.float64,
    ).view(len(parts), 2)
    return ctx.state.sum_over_tensor_ranks(found.to(ctx.state.device)).cpu()


def _smallest(ctx: Context, batches: Batches, layer: LowRankFactors | None, limit: float) -> int:
    """By bisection; ``layer`` is None on the other stages, which take part in the evaluations."""
    low, high = 0, STEPS
    while low < high:
        middle = (low + high) // 2
        if layer is not None:
            layer.importance = middle / STEPS
        kept = ctx.loss(batches) <= limit
        low, high = (low, middle) if kept else (middle + 1, high)
    if layer is not None:
        layer.importance = 1.0
    return low
