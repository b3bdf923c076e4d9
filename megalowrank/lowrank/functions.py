"""Column- and row-parallel products with low-rank factors inside, on the collectives of the plain product.

y = x Wᵀ + b + Σ_g s_g · (x A_gᵀ) B_g. A column-parallel W is split by rows, with the Bᵀ_g, and A is replicated; a
row-parallel one is split by columns, with the A_g, and Bᵀ is replicated. Shapes: x [.., I], W [O, I], A_g [r_g, I],
Bᵀ_g [r_g, O_g], all of them this rank's part; R is the sum of the ranks r_g, N the number of tokens.

Under sequence parallelism dimension 0 of what lies between linears is split over the group. *Ride*: the R-wide
product u is in the buffer of the collective of the plain product. *Partial*: only the plain product's tensor travels,
the product with the replicated factor is repeated on every rank and its gradient is a partial sum. One rank
communicates nothing, and does what *partial* does.

|                | column, forward   | column, backward       | row, forward          | row, backward      |
|----------------|-------------------|------------------------|-----------------------|--------------------|
| whole sequence | -                 | all-reduce dx, du      | all-reduce y, u       | -                  |
| split sequence | all-gather x, u   | reduce-scatter dx, du  | reduce-scatter y, u   | all-gather dy, du  |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megalowrank.lowrank.fold import Tap
from megalowrank.lowrank.pairs import Pairs, Products
from megalowrank.parallel.mappings import gather_rows, reduce_rows, splits_sequence, start_gather, start_reduce
from megalowrank.parallel.wire import Wire

Gradients = tuple[torch.Tensor | None, ...]
_FACTORS = 7  # inputs of the products before A_1


class LowRankColumnFunction(torch.autograd.Function):
    """The column-parallel product with W frozen.

    Called as apply(x, W, bias, pairs, wire, tap, anchor, A_1, …, A_G, Bᵀ_1, …, Bᵀ_G); ``bias`` [O] is split like W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        pairs: Pairs,
        wire: Wire,
        tap: Tap | None,
        anchor: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        low = Products(pairs, factors)
        kept_NI = x.reshape(-1, x.shape[-1])
        if splits_sequence(wire) and wire.ride:
            both = _Pair(kept_NI, x.shape[-1], low.width, rows=True)
            both.left.copy_(kept_NI)
            low.narrow(kept_NI, both.right)
            x_NI, u_NR = both.parts(gather_rows(both.buffer, wire))
            u_NR = u_NR.contiguous()
        else:
            x_NI = kept_NI = gather_rows(kept_NI, wire)
            u_NR = low.narrow(x_NI, x_NI.new_empty(x_NI.shape[0], low.width))
        y_NO = F.linear(x_NI, W, bias)
        low.widen(y_NO, u_NR)
        ctx.save_for_backward(kept_NI, W, u_NR, *factors)
        ctx.pairs, ctx.wire, ctx.shape, ctx.has_bias, ctx.tap = pairs, wire, x.shape, bias is not None, tap
        return y_NO.view(*_gathered(x.shape, wire), W.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        x_NI, W, u_NR, *factors = ctx.saved_tensors
        low = Products(ctx.pairs, factors, ctx.needs_input_grad[_FACTORS:])
        dy_NO = gradients[0].reshape(-1, W.shape[0])
        needs_x = ctx.needs_input_grad[0]
        if ctx.wire.ride and ctx.wire.size > 1:
            both = _Pair(dy_NO, W.shape[1] if needs_x else 0, low.width, rows=ctx.wire.sequence)
            if needs_x:
                torch.mm(dy_NO, W, out=both.left)
            low.narrow_gradient(dy_NO, both.right)
            pending = start_reduce(both.buffer, ctx.wire)
            grad_B, grad_bias = low.gradients_B(u_NR, dy_NO), _gradient_bias(ctx, dy_NO)
            dx_NI, du_NR = both.parts(pending.wait())
            grad_A = low.gradients_A(du_NR, x_NI)
            grad_x = low.add_narrow(dx_NI, du_NR).view(ctx.shape) if needs_x else None
            x_NI = gather_rows(x_NI, ctx.wire) if ctx.tap is not None else x_NI
        else:
            du_NR = low.narrow_gradient(dy_NO, torch.empty_like(u_NR))
            reduced = start_reduce(low.add_narrow(dy_NO @ W, du_NR), ctx.wire) if needs_x else None
            grad_A, grad_B = low.gradients_A(du_NR, x_NI), low.gradients_B(u_NR, dy_NO)
            grad_bias = _gradient_bias(ctx, dy_NO)
            grad_x = None if reduced is None else reduced.wait().view(ctx.shape)
        return grad_x, None, grad_bias, None, None, None, tapped(ctx, dy_NO, x_NI), *grad_A, *grad_B


class LowRankRowFunction(torch.autograd.Function):
    """The row-parallel product with W frozen.

    Called as apply(x, W, bias, pairs, wire, tap, anchor, A_1, …, A_G, Bᵀ_1, …, Bᵀ_G); ``bias`` [O] is replicated and
    added once, to the sum over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        pairs: Pairs,
        wire: Wire,
        tap: Tap | None,
        anchor: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        low = Products(pairs, factors)
        x_NI = x.reshape(-1, x.shape[-1])
        if wire.ride and wire.size > 1:
            both = _Pair(x_NI, W.shape[0], low.width, rows=wire.sequence)
            torch.mm(x_NI, W.t(), out=both.left)
            low.narrow(x_NI, both.right)
            y_NO, u_NR = both.parts(reduce_rows(both.buffer, wire))
            y_NO, u_NR = y_NO.contiguous(), u_NR.clone(memory_format=torch.contiguous_format)
            low.widen(y_NO, u_NR)
        else:
            u_NR = low.narrow(x_NI, x_NI.new_empty(x_NI.shape[0], low.width))
            y_NO = F.linear(x_NI, W, bias if wire.size == 1 else None)
            low.widen(y_NO, u_NR)
            y_NO = reduce_rows(y_NO, wire)
        if bias is not None and wire.size > 1:
            y_NO.add_(bias)
        ctx.save_for_backward(x_NI, W, u_NR, *factors)
        ctx.pairs, ctx.wire, ctx.shape, ctx.has_bias, ctx.tap = pairs, wire, x.shape, bias is not None, tap
        return y_NO.view(*_scattered(x.shape, wire), W.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        x_NI, W, u_NR, *factors = ctx.saved_tensors
        low = Products(ctx.pairs, factors, ctx.needs_input_grad[_FACTORS:])
        dy_NO = gradients[0].reshape(-1, W.shape[0])
        if splits_sequence(ctx.wire) and ctx.wire.ride:
            both = _Pair(dy_NO, W.shape[0], low.width, rows=True)
            both.left.copy_(dy_NO)
            low.narrow_gradient(dy_NO, both.right)
            pending = start_gather(both.buffer, ctx.wire)
            grad_B, grad_bias = low.gradients_B(u_NR, dy_NO), _gradient_bias(ctx, dy_NO)
            dy_NO, du_NR = both.parts(pending.wait())
        else:
            pending = start_gather(dy_NO, ctx.wire)
            grad_bias = _gradient_bias(ctx, dy_NO)
            dy_NO = pending.wait()
            du_NR = low.narrow_gradient(dy_NO, torch.empty_like(u_NR))
            grad_B = low.gradients_B(u_NR, dy_NO)
        grad_x = low.add_narrow(dy_NO @ W, du_NR).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_A = low.gradients_A(du_NR, x_NI)
        return grad_x, None, grad_bias, None, None, None, tapped(ctx, dy_NO, x_NI), *grad_A, *grad_B


class ColumnFunction(torch.autograd.Function):
    """The column-parallel product without factors, W trained or not: apply(x, W, bias, wire).

    Of a split sequence only this rank's rows are kept, and gathered again where W needs its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, wire: Wire) -> torch.Tensor:
        ctx.save_for_backward(x, W)
        ctx.wire, ctx.has_bias = wire, bias is not None
        return F.linear(gather_rows(x, wire), W, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        x, W = ctx.saved_tensors
        dy_NO = gradients[0].reshape(-1, W.shape[0])
        x_NI = x.reshape(-1, W.shape[1])
        gathered = start_gather(x_NI, ctx.wire) if ctx.needs_input_grad[1] else None
        reduced = start_reduce(dy_NO @ W, ctx.wire) if ctx.needs_input_grad[0] else None
        grad_bias = _gradient_bias(ctx, dy_NO)
        grad_W = None if gathered is None else dy_NO.t() @ gathered.wait()
        return None if reduced is None else reduced.wait().view(x.shape), grad_W, grad_bias, None


class RowFunction(torch.autograd.Function):
    """The row-parallel product without factors, W trained or not: apply(x, W, bias, wire)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, wire: Wire) -> torch.Tensor:
        ctx.save_for_backward(x, W)
        ctx.wire, ctx.has_bias = wire, bias is not None
        y = reduce_rows(F.linear(x, W), wire)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        x, W = ctx.saved_tensors
        dy_NO = gradients[0].reshape(-1, W.shape[0])
        pending = start_gather(dy_NO, ctx.wire)
        grad_bias = _gradient_bias(ctx, dy_NO)
        dy_NO = pending.wait()
        grad_x = (dy_NO @ W).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_W = dy_NO.t() @ x.reshape(-1, W.shape[1]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_W, grad_bias, None


class _Pair:
    """Two matrices of as many rows in one buffer: side by side (``rows``), or one after the other."""

    def __init__(self, like: torch.Tensor, left: int, right: int, rows: bool) -> None:
        self._widths, count = [left, right], like.shape[0]
        self.buffer = like.new_empty((count, left + right) if rows else count * (left + right))
        self.left, self.right = self.parts(self.buffer)

    def parts(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the two in a buffer of the same kind, with any number of rows."""
        if buffer.dim() == 2:
            left, right = buffer.split(self._widths, 1)
            return left, right
        count = buffer.numel() // max(1, sum(self._widths))
        left, right = buffer.split([count * width for width in self._widths])
        return left.view(count, self._widths[0]), right.view(count, self._widths[1])


def _gathered(shape: torch.Size, wire: Wire) -> tuple[int, ...]:
    """Leading dimensions of the output for an input whose rows are gathered."""
    return (shape[0] * wire.size, *shape[1:-1]) if splits_sequence(wire) else shape[:-1]


def _scattered(shape: torch.Size, wire: Wire) -> tuple[int, ...]:
    """Leading dimensions of the output for an input whose product is scattered by rows."""
    return (shape[0] // wire.size, *shape[1:-1]) if splits_sequence(wire) else shape[:-1]


def tapped(ctx: Any, dy_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor | None:
    """Hand out the gradient of W if it is asked for; what the anchor gets is nothing."""
    if ctx.tap is None:
        return None
    ctx.tap.take(dy_NO.t() @ x_NI)
    return torch.zeros_like(ctx.tap.anchor)


def _gradient_bias(ctx: Any, dy_NO: torch.Tensor) -> torch.Tensor | None:
    return dy_NO.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
