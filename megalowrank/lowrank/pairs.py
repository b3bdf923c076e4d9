"""The low-rank products of one linear: which pairs of factors take part, and their arithmetic on one rank.

Shapes: x [N, I], y [N, O], A_g [r_g, I], Bᵀ_g [r_g, O_g], u and du [N, R] with R the sum of the ranks that take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Pairs:
    """Of every pair of factors of a linear: the first column of y that it adds to, and its scale s.

    A pair with s = 0 takes no part: it costs no product, and the gradient of its factors is 0.
    """

    starts: tuple[int, ...]
    scales: tuple[float, ...]


class Products:
    """The products of the pairs that take part, of ``factors`` A_1, …, A_G, Bᵀ_1, …, Bᵀ_G.

    ``needed``: which of them want a gradient.
    """

    def __init__(self, pairs: Pairs, factors: Sequence[torch.Tensor], needed: Sequence[bool] = ()) -> None:
        self._factors, self._needed, count = factors, needed, len(factors) // 2
        self._chosen = [g for g in range(count) if pairs.scales[g]]
        self._A = [factors[g] for g in self._chosen]
        self._Bt = [factors[count + g] for g in self._chosen]
        self._starts = [pairs.starts[g] for g in self._chosen]
        self._scales = [pairs.scales[g] for g in self._chosen]
        self._ranks = [a.shape[0] for a in self._A]
        self.width = sum(self._ranks)

    def narrow(self, x_NI: torch.Tensor, out_NR: torch.Tensor) -> torch.Tensor:
        """u_g = s_g · x A_gᵀ of all pairs in one product."""
        if not self._A:
            return out_NR
        return self._scale(torch.mm(x_NI, self._stack().t(), out=out_NR))

    def widen(self, y_NO: torch.Tensor, u_NR: torch.Tensor) -> None:
        """y += u B, in place, pair by pair."""
        for narrow, wide, b in self._blocks():
            y_NO[:, wide].addmm_(u_NR[:, narrow], b)

    def narrow_gradient(self, dy_NO: torch.Tensor, out_NR: torch.Tensor) -> torch.Tensor:
        """du_g = s_g · dy Bᵀ_g, pair by pair."""
        for narrow, wide, b in self._blocks():
            torch.mm(dy_NO[:, wide], b.t(), out=out_NR[:, narrow])
        return self._scale(out_NR)

    def add_narrow(self, dx_NI: torch.Tensor, du_NR: torch.Tensor) -> torch.Tensor:
        """dx + du A, contiguous; in place where dx is."""
        if not self._A:
            return dx_NI.contiguous()
        stack = self._stack()
        return dx_NI.addmm_(du_NR, stack) if dx_NI.is_contiguous() else torch.addmm(dx_NI, du_NR, stack)

    def gradients_A(self, du_NR: torch.Tensor, x_NI: torch.Tensor) -> Gradients:
        """Those of A_1, …, A_G; one product for all where all are trained, else one for each that is."""
        if self._chosen and all(self._needed[g] for g in self._chosen):
            found: Gradients = (du_NR.t() @ x_NI).split(self._ranks)
        else:
            parts = zip(self._chosen, du_NR.split(self._ranks, 1) if self._chosen else (), strict=True)
            found = tuple(du.t() @ x_NI if self._needed[g] else None for g, du in parts)
        return self._of_all(found, 0)

    def gradients_B(self, u_NR: torch.Tensor, dy_NO: torch.Tensor) -> Gradients:
        """Those of Bᵀ_1, …, Bᵀ_G."""
        count = len(self._factors) // 2
        parts = zip(self._chosen, self._blocks(), strict=True)
        found = tuple(
            u_NR[:, narrow].t() @ dy_NO[:, wide] if self._needed[count + g] else None for g, (narrow, wide, _) in parts
        )
        return self._of_all(found, count)

    def _of_all(self, found: Gradients, first: int) -> Gradients:
        """With zeros for the trained factors that take no part, so that engines see the same graph in every step."""
        count = len(self._factors) // 2
        if len(found) == count:
            return found
        own = dict(zip(self._chosen, found, strict=True))
        rest = {
            g: torch.zeros_like(self._factors[first + g]) if self._needed[first + g] else None
            for g in range(count) if g not in own
        }  # fmt: skip
        return tuple((own | rest)[g] for g in range(count))

    def _blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Columns of u, columns of y and Bᵀ of every pair."""
        row = 0
        for b, start in zip(self._Bt, self._starts, strict=True):
            rank, out = b.shape
            yield slice(row, row + rank), slice(start, start + out), b
            row += rank

    def _stack(self) -> torch.Tensor:
        return self._A[0] if len(self._A) == 1 else torch.cat(self._A)

    def _scale(self, u_NR: torch.Tensor) -> torch.Tensor:
        if len(set(self._scales)) == 1:
            return u_NR.mul_(self._scales[0])
        for part, scale in zip(u_NR.split(self._ranks, 1) if self._ranks else (), self._scales, strict=True):
            part.mul_(scale)
        return u_NR
