"""How W takes the mean over heads of low-rank products: by the factors of all, or by one reduction of the products.

Both add up in the order of heads in the precision of masters, so that W has the same bits on every head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.base import Context

Pair = tuple[torch.Tensor, torch.Tensor]  # [A; A'] and [Bᵀ; -B'ᵀ] of a matrix: vectors, some of them negated


def merge_bytes(vectors: int, rows: int, columns: int, heads: int, itemsize: int) -> tuple[float, float]:
    """Bytes that a rank receives to merge a matrix: by the factors of all heads, by one reduction of their product.

    ``vectors`` of A and of Bᵀ, snapshots included, of ``itemsize`` bytes an element; ``rows`` and ``columns`` are those
    on this rank, and products are float32.
    """
    return (heads - 1) * vectors * (rows + columns) * itemsize, 8 * rows * columns * (heads - 1) / heads


def fold_mean(
    layers: Sequence[LowRankFactors], pairs: Sequence[Pair], ctx: Context, heads_per_rank: int, what: str
) -> None:
    """W += s / (heads · heads_per_rank) Σ B A for every matrix, in the way that is fewer bytes for it.

    ``pairs`` are this head's, in the precision of masters. Every rank of all heads calls it alike; ``what`` is for
    errors.
    """
    dense: list[int] = []
    factors: list[int] = []
    for i, (A, Bt) in enumerate(pairs):
        count = 1 if ctx.heads is None else ctx.heads.count
        by_factors, by_product = merge_bytes(len(A), Bt.shape[1], A.shape[1], count, ctx.state.forward.dtype.itemsize)
        (dense if by_product < by_factors else factors).append(i)
    for fold, chosen in ((_fold_factors, factors), (_fold_products, dense)):
        if chosen:
            fold([layers[i] for i in chosen], [pairs[i] for i in chosen], ctx, heads_per_rank, what)


def _fold_factors(
    layers: Sequence[LowRankFactors], pairs: Sequence[Pair], ctx: Context, heads_per_rank: int, what: str
) -> None:
    """Every head gets the factors of all and adds them up."""
    traveling = torch.cat([factor.flatten() for pair in pairs for factor in pair]).to(ctx.state.forward.dtype)
    everyone = [traveling] if ctx.heads is None else ctx.heads.gather(traveling, what)
    sizes = [factor.numel() for pair in pairs for factor in pair]
    parts = [packed.to(ctx.state.dtype).split(sizes) for packed in everyone]
    for i, (layer, (A, Bt)) in enumerate(zip(layers, pairs, strict=True)):
        v = torch.cat([head[2 * i].view_as(A) for head in parts])
        u = torch.cat([head[2 * i + 1].view_as(Bt) for head in parts])
        layer.weight.add(layer.row_start, u, v, layer.scale / (len(everyone) * heads_per_rank))


def _fold_products(
    layers: Sequence[LowRankFactors], pairs: Sequence[Pair], ctx: Context, heads_per_rank: int, what: str
) -> None:
    """Heads share the adding up: each does a part of every product."""
    assert ctx.heads is not None
    products = [layer.scale / heads_per_rank * (Bt.t() @ A) for layer, (A, Bt) in zip(layers, pairs, strict=True)]
    mean = ctx.heads.mean_in_order(torch.cat([product.flatten() for product in products]), what)
    for layer, product, values in zip(layers, products, mean.split([p.numel() for p in products]), strict=True):
        layer.weight.add_values(layer.row_start, values.view_as(product))


def blocks(layers: Sequence[LowRankFactors]) -> Iterator[tuple[int, list[LowRankFactors]]]:
    """The matrices of every block of the model with the number of the first: what travels at once."""
    first = 0
    for _, found in groupby(layers, key=lambda layer: layer.name.split(".")[1]):
        block = list(found)
        yield first, block
        first += len(block)


def vectors_of(first: int, layers: Sequence[LowRankFactors]) -> VectorSet:
    """All vectors of A and Bᵀ of consecutive matrices, of which ``first`` is the number of the first."""
    ranks = [layer.rank for layer in layers for _ in "AB"]
    lengths = [length.padded for layer in layers for length in (layer.columns, layer.rows)]
    return VectorSet.whole(list(range(2 * first, 2 * first + len(lengths))), ranks, lengths)
