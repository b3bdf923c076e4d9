"""The factors of one logical matrix: y = x Wᵀ + s · (x Aᵀ) B, with B stored as Bᵀ [r, out].

A fused projection (QKV, gate and up) holds one ``LowRankFactors`` per logical matrix, because rank,
scale, pool and bounds belong to the logical matrix. Both factors are stored vector by vector, so that
a vector is contiguous whatever cuts the optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalowrank.lowrank.fold import FoldedWeight


@dataclass(frozen=True)
class LowRankSpec:
    """What a method wants of an adapted linear: rank r and scale s of every logical matrix."""

    rank: int
    scale: float


class RowGate:
    """A gradient mask of a factor: rows in ``frozen`` get no gradient.

    Applied as the gradient arrives, before accumulation and reduction, so that a frozen vector weighs
    in no norm and in no collective result. Ranges are (start, stop) of rows.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.frozen: list[tuple[int, int]] = []
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

    ``index`` is the global number of the matrix in the model, independent of the layout; all shapes
    are those of the logical matrix.
    """

    def __init__(
        self,
        name: str,
        A: torch.nn.Parameter,
        Bt: torch.nn.Parameter,
        weight: FoldedWeight,
        row_start: int,
        scale: float,
    ) -> None:
        self.name, self.index = name, -1
        self.A, self.Bt = A, Bt
        self.weight, self.row_start, self.scale = weight, row_start, scale
        self.rank, self.in_features = A.shape
        self.out_features = Bt.shape[1]
        self.gate_A, self.gate_Bt = RowGate(A), RowGate(Bt)

    def fold(self, u_KM: torch.Tensor, v_KN: torch.Tensor) -> None:
        """W += s · u_KMᵀ v_KN on this rank's part of W. u_KM [k, out], v_KN [k, in]."""
        self.weight.add(self.row_start, u_KM, v_KN, self.scale)


def folded_weights(layers: Sequence[LowRankFactors]) -> list[FoldedWeight]:
    """The frozen weights under ``layers``, each once; the matrices of a fused projection share one."""
    return list({id(layer.weight): layer.weight for layer in layers}.values())
