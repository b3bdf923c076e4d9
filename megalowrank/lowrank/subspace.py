"""The leading singular subspace of a logical matrix of which every rank of a stage holds a part and a share.

The matrix is the mean over data-parallel ranks of what they hold; tensor-parallel ranks hold rows (column-parallel)
or columns (row-parallel) of it. A matrix is reduced to one data-parallel rank, round-robin, and its subspace found
there, by one tensor-parallel rank or by all of them together; then everyone gets it.

| found by   | rows summed over are split         | they are not                          |
|------------|------------------------------------|---------------------------------------|
| svd        | Gram matrices in float64 are added | the matrix is gathered to one rank    |
| randomized | products with r + 8 vectors are added, the matrix stays where it is        |

Source: GaLore (Zhao et al. 2024, sec. 4); randomized range finder with power iterations, Halko et al. 2011, alg. 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.lowrank.factors import LowRankFactors, folded_weights, projects_rows
from megalowrank.parallel.collectives import group_rank, group_size, sum_over
from megalowrank.parallel.partition import Share
from megalowrank.parallel.rng import generator

_OVERSAMPLING, _POWER_ITERATIONS = 8, 2
Product = Callable[[torch.Tensor], torch.Tensor]


def stiefel(rank: int, length: int, *key: object, device: torch.device | None = None) -> torch.Tensor:
    """``rank`` orthonormal rows of ``length``, uniform on the Stiefel manifold, float64; a pure function of ``key``.

    The draw does not depend on ``device``, where it is made orthonormal, but for rounding.
    """
    gaussian = torch.randn(length, rank, dtype=torch.float64, generator=generator(*key))
    Q, R = torch.linalg.qr(gaussian.to(device or gaussian.device))
    return (Q * torch.sign(torch.diagonal(R))).t().contiguous()


def leading_vectors(gram_NN: torch.Tensor, rank: int) -> torch.Tensor:
    """The ``rank`` leading eigenvectors of a symmetric matrix as rows, largest first, with a fixed sign.

    Raises torch.linalg.LinAlgError if the decomposition does not converge.
    """
    vectors = torch.linalg.eigh(gram_NN).eigenvectors
    return fix_signs(vectors[:, -rank:].flip(1).t().contiguous())


def fix_signs(rows: torch.Tensor) -> torch.Tensor:
    """Every row with its largest element positive, so that rounding does not turn it round."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def iterated_vectors(product: Product, start_NK: torch.Tensor, rank: int) -> torch.Tensor:
    """As ``leading_vectors``, approximately, of a matrix of which only products with [N, K] are known.

    Zeros if it is not finite.
    """
    Q_NK = torch.linalg.qr(product(start_NK)).Q
    for _ in range(_POWER_ITERATIONS):
        Q_NK = torch.linalg.qr(product(Q_NK)).Q
    small = Q_NK.t() @ product(Q_NK)
    if not bool(torch.isfinite(small).all()):
        return small.new_zeros(rank, len(Q_NK))
    return fix_signs(leading_vectors((small + small.t()) / 2, rank) @ Q_NK.t())


@dataclass
class _Found:
    """What this rank has of one matrix: nothing, a Gram matrix still to be decomposed, or the vectors."""

    layer: LowRankFactors
    length: int
    gram: torch.Tensor | None = None
    vectors: torch.Tensor | None = None


class SubspaceSearch:
    """Finds the leading subspaces of the gradients of ``layers``, each on the narrower side of its matrix.

    ``take`` is for a probe of ``weights``, or ``draw``; then ``results``. Every rank of a stage makes the same calls in
    the same order; ``data`` and ``tensor`` are the stage's groups. ``key`` seeds what is random, with the name of a
    matrix; vectors come in the precision and on the device of ``like``. Afterwards ``failed`` counts decompositions
    that did not converge, ``unfit`` matrices that were not finite, both over the stage, and ``peak`` the bytes that
    this rank held at once.
    """

    def __init__(
        self,
        layers: Sequence[LowRankFactors],
        data: Any,
        tensor: Any,
        randomized: bool,
        key: tuple[object, ...],
        like: torch.Tensor | None = None,
    ) -> None:
        self.weights, self._like = folded_weights(layers), torch.empty(0) if like is None else like
        self.data, self.tensor, self.randomized, self.key = data, tensor, randomized, key
        self.failed = self.unfit = self.peak = self._held = 0
        self._layers = [[layer for layer in layers if layer.weight is weight] for weight in self.weights]
        self._found: list[_Found] = []

    def take(self, number: int, gradient: torch.Tensor) -> None:
        """The gradient of ``weights[number]``, this rank's part, the mean over this rank's tokens. Collective."""
        for layer in self._layers[number]:
            rows = gradient[layer.row_start : layer.row_start + layer.rows.real, : layer.columns.real]
            self._add(layer, rows.contiguous())
            self.peak = max(self.peak, gradient.nbytes + rows.nbytes + self._held)

    def draw(self) -> None:
        """Random subspaces instead: each is drawn by the rank that would have found it."""
        for layer in (layer for layers in self._layers for layer in layers):
            right = projects_rows(layer.out_features, layer.in_features)
            found = _Found(layer, layer.in_features if right else layer.out_features)
            if self._gives(layer):
                found.vectors = stiefel(layer.rank, found.length, *self.key, layer.name, device=self._like.device)
            self._found.append(found)

    def _add(self, layer: LowRankFactors, part: torch.Tensor) -> None:
        """``part`` [rows, columns] of the gradient of a matrix, without padding, which is overwritten."""
        right, ranks = projects_rows(layer.out_features, layer.in_features), group_size(self.data)
        own = layer.columns if right else layer.rows
        found = _Found(layer, own.size)
        self._found.append(found)
        owner, tensor_owner = self._owners(layer)
        if ranks > 1:
            dist.reduce(part, group_dst=owner, group=self.data)
        if group_rank(self.data) != owner:
            return
        tall = (part if right else part.t()).div(ranks)  # the wanted vectors are as long as its rows
        if self.randomized:
            found.vectors = iterated_vectors(self._product(tall, own), self._start(layer, own.size, tall), layer.rank)
            return
        gram = self._gram(tall, own, tensor_owner)
        if group_rank(self.tensor) == tensor_owner:
            found.gram, self._held = gram, self._held + gram.nbytes
            if ranks * group_size(self.tensor) == 1:
                self._decompose(found)

    def results(self) -> list[tuple[LowRankFactors, torch.Tensor]]:
        """The leading vectors as rows [r, length] of every matrix that is finite, on every rank. Collective."""
        if not self._found:
            return []
        parts = [self._contribution(found) for found in self._found]
        parts.append(parts[0].new_tensor([self.failed]))
        flat = sum_over(sum_over(torch.cat([part.view(-1) for part in parts]), self.tensor), self.data)
        split = flat.split([part.numel() for part in parts])
        *wholes, failed = [whole.view(part.shape) for whole, part in zip(split, parts, strict=True)]
        self.failed = int(failed)
        fit = [(found.layer, whole) for found, whole in zip(self._found, wholes, strict=True) if bool(whole.any())]
        self.unfit += len(wholes) - len(fit)
        self._found.clear()
        return fit

    def _owners(self, layer: LowRankFactors) -> tuple[int, int]:
        """The data-parallel and the tensor-parallel rank that a matrix falls to."""
        ranks = group_size(self.data)
        return layer.index % ranks, layer.index // ranks % group_size(self.tensor)

    def _gives(self, layer: LowRankFactors) -> bool:
        """Whether this rank gives what is found of a matrix to all."""
        return (group_rank(self.data), group_rank(self.tensor)) == self._owners(layer)

    def _gram(self, tall: torch.Tensor, own: Share, tensor_owner: int) -> torch.Tensor:
        """tallᵀ tall of the whole matrix in float64, on ``tensor_owner``."""
        if own.padded < own.size:
            tall = _gather_columns(tall, own, self.tensor, tensor_owner)
        gram = tall.double().t() @ tall.double()
        if own.padded == own.size and group_size(self.tensor) > 1:
            dist.reduce(gram, group_dst=tensor_owner, group=self.tensor)
        return gram

    def _product(self, tall: torch.Tensor, own: Share) -> Product:
        """X -> tallᵀ tall X with the whole matrix; collective over the tensor-parallel ranks."""

        def product(X: torch.Tensor) -> torch.Tensor:
            if own.padded == own.size:
                return sum_over(tall.t() @ (tall @ X), self.tensor)
            found = torch.zeros_like(X)
            found[own.start : own.stop] = tall.t() @ sum_over(tall @ X[own.start : own.stop], self.tensor)
            return sum_over(found, self.tensor)

        return product

    def _start(self, layer: LowRankFactors, length: int, like: torch.Tensor) -> torch.Tensor:
        width = min(layer.rank + _OVERSAMPLING, length)
        return torch.randn(length, width, generator=generator(*self.key, "start", layer.name)).to(like)

    def _decompose(self, found: _Found) -> None:
        """Find the vectors of a Gram matrix and drop it; by iteration where the decomposition fails."""
        gram, found.gram = found.gram, None
        if gram is None:
            return
        self._held -= gram.nbytes
        if not bool(torch.isfinite(gram).all()):
            return
        try:
            found.vectors = leading_vectors(gram, found.layer.rank)
        except torch.linalg.LinAlgError:
            self.failed += 1
            start = self._start(found.layer, found.length, gram)
            found.vectors = iterated_vectors(lambda X: gram @ X, start, found.layer.rank)

    def _contribution(self, found: _Found) -> torch.Tensor:
        """The vectors on the one rank that gives them to all, zeros elsewhere."""
        self._decompose(found)
        if self._gives(found.layer) and found.vectors is not None and bool(torch.isfinite(found.vectors).all()):
            return found.vectors.to(self._like)
        return self._like.new_zeros(found.layer.rank, found.length)


def _gather_columns(part: torch.Tensor, own: Share, group: Any, owner: int) -> torch.Tensor:
    """The whole of a matrix of which every rank has columns, on ``owner``; elsewhere ``part``."""
    padded = torch.nn.functional.pad(part, (0, own.padded - own.real)).contiguous()
    mine = group_rank(group) == owner
    parts = [torch.empty_like(padded) for _ in range(group_size(group))] if mine else None
    dist.gather(padded, parts, group_dst=owner, group=group)
    return part if parts is None else torch.cat(parts, 1)[:, : own.size]
