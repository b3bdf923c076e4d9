"""Megatron-core's parallel linears with low-rank factors inside.

Shapes: x [.., in], W [out, in], A [r, in], Bᵀ [r, out] per logical matrix g; the matrices of a fused
projection are consecutive row blocks of W. N is the number of tokens, R the sum of the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megalowrank.lowrank.factors import LowRankFactors, LowRankSpec
from megalowrank.lowrank.fold import FoldedWeight

Blocks = tuple[tuple[str, int], ...]


class LowRankFunction(torch.autograd.Function):
    """y = x Wᵀ + b + s · Σ_g (x A_gᵀ) B_g with W frozen: only x and the r-wide product are kept.

    Called as apply(x, W, bias, scale, A_1, …, A_G, Bᵀ_1, …, Bᵀ_G).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        count = len(factors) // 2
        x_NI = x.reshape(-1, x.shape[-1])
        u_NR = (x_NI @ _stack(factors[:count]).t()).mul_(scale)
        y_NO = F.linear(x_NI, W, bias)
        row, column = 0, 0
        for Bt in factors[count:]:
            rank, out = Bt.shape
            y_NO[:, column : column + out].addmm_(u_NR[:, row : row + rank], Bt)
            row, column = row + rank, column + out
        ctx.save_for_backward(x_NI, W, u_NR, *factors)
        ctx.scale, ctx.shape, ctx.has_bias = scale, x.shape, bias is not None
        return y_NO.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, W, u_NR, *factors = ctx.saved_tensors
        count = len(factors) // 2
        dy_NO = gradients[0].reshape(-1, W.shape[0])
        du_NR = torch.empty_like(u_NR)
        grad_B: list[torch.Tensor] = []
        row, column = 0, 0
        for Bt in factors[count:]:
            rank, out = Bt.shape
            dy_g = dy_NO[:, column : column + out]
            torch.mm(dy_g, Bt.t(), out=du_NR[:, row : row + rank])
            grad_B.append(u_NR[:, row : row + rank].t() @ dy_g)
            row, column = row + rank, column + out
        du_NR.mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(dy_NO @ W, du_NR, _stack(factors[:count])).view(ctx.shape)
        grad_A = (du_NR.t() @ x_NI).split([A.shape[0] for A in factors[:count]])
        grad_bias = dy_NO.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, *grad_A, *grad_B


def _stack(tensors: Any) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


class _Adapted(torch.nn.Module):
    """What both parallel linears share. ``blocks``: (logical name, rows of W) in order."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    skip_bias_add: bool
    blocks: Blocks
    scale: float
    factors: list[LowRankFactors]

    def _adopt(self, blocks: Blocks, lowrank: LowRankSpec | None) -> None:
        self.blocks, self.factors, self.scale = blocks, [], 0.0
        if lowrank is None:
            return
        self.weight.requires_grad_(False)
        self.scale = lowrank.scale
        folded, row = FoldedWeight(self.weight), 0
        for name, rows in blocks:
            A = self._new_factor(f"A_{name}", lowrank.rank, self.weight.shape[1])
            Bt = self._new_factor(f"B_{name}", lowrank.rank, rows)
            self.factors.append(LowRankFactors(name, A, Bt, folded, row, lowrank.scale))
            row += rows

    def _new_factor(self, name: str, rank: int, length: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(rank, length, dtype=self.weight.dtype))
        self.register_parameter(name, parameter)
        return parameter

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.factors:
            return F.linear(x, self.weight, bias)
        A = [getattr(self, f"A_{name}") for name, _ in self.blocks]
        Bt = [getattr(self, f"B_{name}") for name, _ in self.blocks]
        return LowRankFunction.apply(x, self.weight, bias, self.scale, *A, *Bt)


class LowRankColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel linear; ``lowrank`` None makes it a plain trainable one."""

    def __init__(self, *args: Any, blocks: Blocks, lowrank: LowRankSpec | None, **kwargs: Any) -> None:
        ColumnParallelLinear.__init__(self, *args, **kwargs)
        self._adopt(blocks, lowrank)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [.., in] -> (y [.., out], bias if it is left to the caller)."""
        y = self._multiply(input_, None if self.skip_bias_add else self.bias)
        return y, self.bias if self.skip_bias_add else None


class LowRankRowParallelLinear(_Adapted, RowParallelLinear):
    """Row-parallel linear; ``lowrank`` None makes it a plain trainable one."""

    def __init__(self, *args: Any, blocks: Blocks, lowrank: LowRankSpec | None, **kwargs: Any) -> None:
        RowParallelLinear.__init__(self, *args, **kwargs)
        self._adopt(blocks, lowrank)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [.., in] -> (y [.., out], bias if it is left to the caller)."""
        y = self._multiply(input_, None if self.skip_bias_add else self.bias)
        return y, self.bias if self.skip_bias_add else None
