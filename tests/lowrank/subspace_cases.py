"""Matrices of some layers, divided over ranks as column- and row-parallel linears do."""

from __future__ import annotations

from typing import Any

import torch

from megalowrank.config import ParallelConfig
from megalowrank.engine.zero import initialize_distributed
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.lowrank.subspace import SubspaceSearch
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.partition import share

SHAPES = [(24, 16), (16, 24), (21, 17), (17, 23), (18, 18)]
"""[out, in] of a matrix; each is divided by rows and, again, by columns."""
RANK = 3


def matrix_of(index: int) -> torch.Tensor:
    """A matrix whose singular values fall by a quarter each, so that its leading spaces are clear."""
    rows, columns = SHAPES[index % len(SHAPES)]
    source = torch.Generator().manual_seed(index)
    U = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=source)).Q
    V = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=source)).Q
    size = min(rows, columns)
    return ((U[:, :size] * 0.75 ** torch.arange(size)) @ V[:, :size].t()).float()


def layers_of(rank: int, ranks: int, by_rows: tuple[bool, ...] = (True,)) -> list[LowRankFactors]:
    """A layer for every shape and way to divide it, each with a weight of its own."""
    found = []
    for split_rows in by_rows:
        for rows, columns in SHAPES:
            out = share(rows, rank, ranks) if split_rows else share(rows)
            into = share(columns) if split_rows else share(columns, rank, ranks)
            weight = FoldedWeight(torch.nn.Parameter(torch.zeros(out.padded, into.padded), requires_grad=False))
            A, Bt = (torch.nn.Parameter(torch.zeros(RANK, size.padded)) for size in (into, out))
            layer = LowRankFactors(f"m{len(found)}", A, Bt, weight, 0, 1.0, out, into)
            layer.index = len(found)
            found.append(layer)
    return found


def search(layers: list[LowRankFactors], data: Any, tensor: Any, randomized: bool, noise: float = 0.0) -> list[Any]:
    """The subspaces of all layers, given this rank's part of each matrix plus ``noise``, which ranks share out."""
    finder = SubspaceSearch(layers, data, tensor, randomized, (3, 0))
    for number, layer in enumerate(layers):
        whole = matrix_of(number) + noise
        finder.take(number, layer.columns.take(layer.rows.take(whole, 0), 1).clone())
    found = finder.results()
    assert [layer.index for layer, _ in found] == list(range(len(layers)))
    return [rows for _, rows in found]


def divided(payload: dict[str, Any]) -> list[Any]:
    """Run by every rank: data-parallel ranks differ by a constant that their mean has not."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=payload["tensor"]))
    noise = 0.0 if groups.data_size == 1 else (0.5 if groups.data_rank else -0.5)
    found = []
    for by_rows in (True, False):
        layers = layers_of(groups.tensor_rank, groups.tensor_size, (by_rows,))
        rows = search(layers, groups.data, groups.tensor, payload["randomized"], noise)
        found.append([part.tolist() for part in rows])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=2e-4)
    return found[0]
