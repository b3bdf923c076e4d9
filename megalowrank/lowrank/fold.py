"""W += s · Uᵀ V on whatever part of W a rank holds, without losing small changes to rounding.

W has no optimizer and is folded thousands of times. In plain bfloat16 every fold rounds all of W
again, a random walk; so W may keep, beside its bfloat16 value, the next 8 or 16 bits of its float32
value as an integer residual. The forward pass reads the bfloat16 part alone.

Bits: float32 = (bfloat16 bits << 16) + residual, exact for the 16-bit residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

RESIDUAL_DTYPES = {"none": None, "int8": torch.int8, "int16": torch.int16}
_CHUNK_ELEMENTS = 1 << 24


def split_residual(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [...] -> (bfloat16 [...], residual [...] of ``dtype`` int8 or int16)."""
    bits = value.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    if dtype == torch.int8:
        low = ((low + 0x80) >> 8).clamp_(max=127)
    return high.to(torch.int16).view(torch.bfloat16), low.to(dtype)


def join_residual(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 value of a bfloat16 tensor and its residual."""
    shift = 8 if low.dtype == torch.int8 else 0
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + (low.to(torch.int32) << shift)
    return bits.view(torch.float32)


@dataclass(frozen=True)
class WeightPiece:
    """Elements [start, start + flat.numel()) of the row-major W, as this rank stores them.

    ``mirror`` is (tensor, first element of it in ``flat``): a second copy that follows every change.
    """

    flat: torch.Tensor
    start: int
    mirror: tuple[torch.Tensor, int] | None = None

    def update_mirror(self) -> None:
        """Bring the second copy, if there is one, in line with the first."""
        if self.mirror is not None:
            copy, offset = self.mirror
            copy.copy_(self.flat[offset : offset + copy.numel()])


class FrozenTensor:
    """A parameter without gradient that is overwritten between steps, wherever an engine stores it.

    ``locate`` is asked before every change and always answers with the same elements. Until an engine has bound it the
    tensor lies whole in the parameter.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self.locate: Callable[[], WeightPiece] = lambda: WeightPiece(parameter.data.view(-1), 0)

    def bind(self, locate: Callable[[], WeightPiece]) -> None:
        """Say where this rank stores it, after the engine has cast, moved or sharded it."""
        self.locate = locate


@dataclass(frozen=True)
class Tap:
    """Asks for the gradient of a frozen W: the backward pass of the linear gives it to ``take`` [out, in], in parts.

    Once per backward pass that reaches ``anchor``, a scalar that the linear pretends to depend on; called between
    forward and backward passes of other linears, so that ``take`` may communicate if all ranks do so alike.
    """

    anchor: torch.Tensor
    take: Callable[[torch.Tensor], None]


class Probed(Protocol):
    """A weight [out, in] whose gradient a probe pass can ask for; ``parameter`` tells its type and device."""

    parameter: torch.nn.Parameter
    tap: Tap | None


class FoldedWeight(FrozenTensor):
    """A frozen base weight [out, in] that folds change.

    ``residual`` is created from the float32 weight before any engine casts it; ``bind`` then says
    where the engine keeps the weight. Until then it lies whole in the parameter. ``tap`` is read by the linear
    at every forward pass.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__(parameter)
        self.out_features, self.in_features = parameter.shape
        self.residual: torch.Tensor | None = None
        self.tap: Tap | None = None

    def keep_residual(self, dtype: torch.dtype | None) -> None:
        """Round W to bfloat16 values and keep what the rounding cut, if ``dtype`` says so."""
        if dtype is None:
            return
        high, low = split_residual(self.parameter.data.float(), dtype)
        self.parameter.data.copy_(high)
        self.residual = low.view(-1)

    def bind(self, locate: Callable[[], WeightPiece]) -> None:
        """As ``FrozenTensor``; of the residual only what belongs to the stored elements is kept."""
        super().bind(locate)
        piece = locate()
        if self.residual is not None:
            own = self.residual[piece.start : piece.start + piece.flat.numel()]
            self.residual = own.to(piece.flat.device, copy=True)

    def value(self) -> torch.Tensor:
        """The stored elements with their residual: 1-D, float32 where there is a residual."""
        flat = self.locate().flat
        return flat if self.residual is None else join_residual(flat, self.residual)

    def add(self, row_start: int, u_KM: torch.Tensor, v_KN: torch.Tensor, scale: float) -> None:
        """Rows [row_start, row_start + M) of W += scale · u_KMᵀ v_KN; local, no communication."""
        columns, piece = self.in_features, self.locate()
        whole = piece.flat.numel() == self.out_features * columns
        alike = piece.flat.dtype == u_KM.dtype and piece.flat.device == u_KM.device
        if whole and self.residual is None and alike:
            rows = piece.flat.view(-1, columns)[row_start : row_start + u_KM.shape[1]]
            rows.addmm_(u_KM.t(), v_KN, alpha=scale)
        else:
            self._add_piece(piece, row_start, u_KM, v_KN, scale)
        piece.update_mirror()

    def add_values(self, row_start: int, values_MN: torch.Tensor) -> None:
        """Rows [row_start, row_start + M) of W += values, as far as they are here; local, no communication."""
        piece, first = self.locate(), row_start * self.in_features
        low, high = max(piece.start, first), min(piece.start + piece.flat.numel(), first + values_MN.numel())
        if low < high:
            target = piece.flat[low - piece.start : high - piece.start]
            residual = None if self.residual is None else self.residual[low - piece.start : high - piece.start]
            added = values_MN.reshape(-1)[low - first : high - first].to(target.device)
            value = target.to(added.dtype) if residual is None else join_residual(target, residual)
            _overwrite(target, residual, value + added)
        piece.update_mirror()

    def _add_piece(
        self, piece: WeightPiece, row_start: int, u_KM: torch.Tensor, v_KN: torch.Tensor, scale: float
    ) -> None:
        """Add to the elements of ``piece`` that lie in the row block, a bounded number at a time."""
        columns = self.in_features
        low = max(piece.start, row_start * columns)
        high = min(piece.start + piece.flat.numel(), (row_start + u_KM.shape[1]) * columns)
        step = max(1, _CHUNK_ELEMENTS // columns) * columns
        for first in range(low - low % columns, high, step):
            begin, end = max(first, low), min(first + step, high)
            if begin < end:
                self._add_rows(piece, begin, end, u_KM[:, begin // columns - row_start :], v_KN, scale)

    def _add_rows(
        self, piece: WeightPiece, begin: int, end: int, u_KM: torch.Tensor, v_KN: torch.Tensor, scale: float
    ) -> None:
        """Elements [begin, end) of W; u_KM starts at the row of ``begin``."""
        columns = self.in_features
        first_row, last_row = begin // columns, -(-end // columns)
        target = piece.flat[begin - piece.start : end - piece.start]
        residual = None if self.residual is None else self.residual[begin - piece.start : end - piece.start]
        u = u_KM[:, : last_row - first_row]
        value = target.to(u.dtype) if residual is None else join_residual(target, residual).to(u.dtype)
        rows = u.new_zeros((last_row - first_row) * columns)
        inside = rows[begin - first_row * columns : end - first_row * columns]
        inside.copy_(value)
        rows.view(-1, columns).addmm_(u.t(), v_KN, alpha=scale)
        _overwrite(target, residual, inside)


class ImplicitWeight(FoldedWeight):
    """A W [d, d] that is nowhere stored, the identity or 0 that a shortcut adds to: probed, never folded into.

    ``like`` is a parameter of the shortcut.
    """

    def __init__(self, like: torch.nn.Parameter) -> None:
        super().__init__(like)
        self.out_features = self.in_features

    def add(self, row_start: int, u_KM: torch.Tensor, v_KN: torch.Tensor, scale: float) -> None:
        """There is nothing to add to."""
        raise RuntimeError("a shortcut has no weight to fold into")


def _overwrite(target: torch.Tensor, residual: torch.Tensor | None, value: torch.Tensor) -> None:
    """Store ``value`` in ``target``, and what its rounding cuts in ``residual``, if there is one."""
    if residual is None:
        target.copy_(value)
        return
    high, low = split_residual(value.float(), residual.dtype)
    target.copy_(high)
    residual.copy_(low)
