"""The factors of one logical matrix: y = x Wᵀ + s · (x Aᵀ) B, with B stored as Bᵀ [r, out].

A fused projection (QKV, gate and up) holds one ``LowRankFactors`` per logical matrix, because rank,
scale, pool and bounds belong to the logical matrix. Both factors are stored vector by vector, so that
a vector is contiguous whatever cuts the optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megalowrank.lowrank.fold import FoldedWeight, FrozenTensor, ImplicitWeight
from megalowrank.parallel.partition import Share, share


def projects_rows(out_features: int, in_features: int) -> bool:
    """Whether the projector of a logical matrix of these sizes is of its row space (A), else of its columns (B)."""
    return out_features >= in_features


@dataclass(frozen=True)
class LowRankSpec:
    """What a method wants of an adapted linear: rank r and scale s of every logical matrix.

    ``projector``: the factor on the narrower side of W has no gradient: A where W has at least as many rows as
    columns, else B. ``snapshot``: s · B' A' x is subtracted, with a second pair of factors that has no gradient.
    ``chunks``: of a batch the i-th of so many equal parts sees only the i-th part of the vectors, whose gradients are
    those of the mean over that part alone.
    """

    rank: int
    scale: float
    projector: bool = False
    snapshot: bool = False
    chunks: int = 1

    def trained(self, out_features: int, in_features: int) -> tuple[bool, bool]:
        """Whether A and B of a logical matrix of these sizes have gradients."""
        right = projects_rows(out_features, in_features)
        return (not self.projector or not right), (not self.projector or right)


@dataclass(frozen=True)
class FactorPlace:
    """This rank's part of a factor of the model.

    ``number`` counts the factors of the whole model (A of matrix j is 2j, Bᵀ is 2j + 1); ``length`` says which
    elements of every vector are here. ``counted``: sums over tensor-parallel ranks take it from this rank, so that
    what all of them hold counts once.
    """

    number: int
    length: Share
    counted: bool = True


class LogicalMatrix(Protocol):
    """An adapted matrix as the whole model knows it, whatever part of it a rank holds."""

    @property
    def name(self) -> str:
        """Logical name, such as ``layers.3.attention.q``."""

    @property
    def rank(self) -> int:
        """Rank of its factors."""

    @property
    def out_features(self) -> int:
        """Rows of W."""

    @property
    def in_features(self) -> int:
        """Columns of W."""


class FixedFactor(FrozenTensor):
    """A factor without gradient [r, length] that a method may overwrite; ``length`` is this rank's share of a vector.

    Read and written through ``OptimizerStateView``, wherever an engine stores it.
    """

    def __init__(self, name: str, parameter: torch.nn.Parameter, length: Share) -> None:
        super().__init__(parameter)
        self.name, self.length, self.rank = name, length, parameter.shape[0]


class RowGate:
    """A gradient mask of a factor: rows in ``frozen`` get no gradient.

    Applied as the gradient arrives, before accumulation and reduction, so that a frozen vector weighs
    in no norm and in no collective result. Ranges are (start, stop) of rows.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.frozen: list[tuple[int, int]] = []
        if parameter.requires_grad:
            parameter.register_hook(self._mask)

    def _mask(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.frozen:
            return gradient
        masked = gradient.clone()
        for start, stop in self.frozen:
            masked[start:stop].zero_()
        return masked


class LowRankFactors:
    """A [r, in] and Bᵀ [r, out] of one logical matrix, with the rows of W they adapt.

    ``index`` is the global number of the matrix in the model, independent of the layout. ``rank``, ``in_features``
    and ``out_features`` are those of the logical matrix; ``columns`` and ``rows`` say which part of it this rank
    holds (default: all of it): vectors of A have ``columns.padded`` elements here, those of Bᵀ ``rows.padded``.
    ``fixed`` are the factors without gradient: the projector (A or Bᵀ itself), or the snapshots of A and Bᵀ. While not
    ``enabled`` they take no part in the product and get gradient 0; ``importance`` is a factor on their scale.
    ``split_tokens``: tensor-parallel ranks see different tokens, with both factors whole.
    """

    def __init__(
        self,
        name: str,
        A: torch.nn.Parameter,
        Bt: torch.nn.Parameter,
        weight: FoldedWeight,
        row_start: int,
        scale: float,
        rows: Share | None = None,
        columns: Share | None = None,
    ) -> None:
        self.name, self.index = name, -1
        self.A, self.Bt = A, Bt
        self.weight, self.row_start, self.scale = weight, row_start, scale
        self.rows, self.columns = rows or share(Bt.shape[1]), columns or share(A.shape[1])
        self.rank, self.in_features, self.out_features = A.shape[0], self.columns.size, self.rows.size
        self.enabled, self.importance, self.split_tokens = True, 1.0, False
        self.gate_A, self.gate_Bt = RowGate(A), RowGate(Bt)
        pairs = (("A", A, self.columns), ("B", Bt, self.rows))
        self.fixed = [FixedFactor(side, factor, size) for side, factor, size in pairs if not factor.requires_grad]

    @property
    def is_shortcut(self) -> bool:
        """Whether they stand beside the residual stream, with no W."""
        return isinstance(self.weight, ImplicitWeight)

    @property
    def taking_part(self) -> float:
        """The scale of the low-rank term in the next forward pass; 0: it is not computed."""
        return self.scale * self.importance if self.enabled else 0.0

    def partial(self, gradient_A: torch.Tensor, gradient_Bt: torch.Tensor) -> list[torch.Tensor]:
        """Which of the two, made of this rank's part of the gradient of W, are sums over tensor-parallel ranks."""
        of_A = self.split_tokens or self.rows.padded < self.rows.size
        of_B = self.split_tokens or self.columns.padded < self.columns.size
        return [gradient_A] * of_A + [gradient_Bt] * of_B

    def fold(self, u_KM: torch.Tensor, v_KN: torch.Tensor) -> None:
        """W += s · u_KMᵀ v_KN on this rank's part of W, without communication.

        u_KM [k, rows.padded] and v_KN [k, columns.padded] are this rank's parts of the vectors.
        """
        self.weight.add(self.row_start, u_KM, v_KN, self.scale)

    def own(self, A: torch.Tensor, Bt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's parts of vectors A [k, in] and Bᵀ [k, out] of the logical matrix, padded."""
        return self.columns.take(A, 1), self.rows.take(Bt, 1)


def factor_parameters(layers: Sequence[LowRankFactors]) -> list[torch.nn.Parameter]:
    """A and Bᵀ of every matrix, in the order that vector sets count them."""
    return [parameter for layer in layers for parameter in (layer.A, layer.Bt)]


def factor_places(layers: Sequence[LowRankFactors], tensor_rank: int = 0) -> list[FactorPlace]:
    """Where the factors of this rank lie in those of the model, in the order of ``factor_parameters``."""
    return [
        FactorPlace(2 * layer.index + side, length, length.real != length.size or tensor_rank == 0)
        for layer in layers
        for side, length in enumerate((layer.columns, layer.rows))
    ]


def folded_weights(layers: Sequence[LowRankFactors]) -> list[FoldedWeight]:
    """The frozen weights under ``layers``, each once; the matrices of a fused projection share one."""
    return [weight for weight in probed_weights(layers) if not isinstance(weight, ImplicitWeight)]


def probed_weights(layers: Sequence[LowRankFactors]) -> list[FoldedWeight]:
    """As ``folded_weights``, with those that are only implied."""
    return list({id(layer.weight): layer.weight for layer in layers}.values())


def frozen_tensors(layers: Sequence[LowRankFactors]) -> list[FrozenTensor]:
    """Everything without gradient that belongs to ``layers``: their weights and their fixed factors."""
    return [*folded_weights(layers), *(fixed for layer in layers for fixed in layer.fixed)]
