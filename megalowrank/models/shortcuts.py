"""Low-rank shortcuts round the parts of a block and across blocks: modules that a method may switch on and off.

Of block i with input x, state m after attention and output y, and m' the state m of block i - 1, each with factors
A [r, H] and Bᵀ [r, H] of its own (P z = s · B A z, 0 at the start):

  m = x + attention(norm₁ x) + P_residual_1 x + P_cross_cut m'
  y = m + mlp(norm₂ m) + P_residual_2 m + P_cross_in x

Source: HeteroLoRA (Zhang et al. 2024); which states the cross shortcuts join is read from its description.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megalowrank.lowrank.factors import LowRankFactors, LowRankSpec
from megalowrank.lowrank.fold import ImplicitWeight, Tap
from megalowrank.lowrank.functions import tapped
from megalowrank.lowrank.pairs import Pairs, Products
from megalowrank.models.projections import SHORTCUTS
from megalowrank.parallel.mappings import splits_sequence
from megalowrank.parallel.wire import Wire, mark_partial


class Shortcut(torch.nn.Module):
    """y = base + s · B A x, tokens [.., H]; the same on all tensor-parallel ranks, but for their part of a sequence."""

    def __init__(self, name: str, hidden: int, spec: LowRankSpec, wire: Wire, dtype: torch.dtype) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.zeros(spec.rank, hidden, dtype=dtype))
        self.Bt = torch.nn.Parameter(torch.zeros(spec.rank, hidden, dtype=dtype))
        self.factors = LowRankFactors(name, self.A, self.Bt, ImplicitWeight(self.A), 0, spec.scale)
        self.factors.split_tokens = splits_sequence(wire)
        if self.factors.split_tokens:
            mark_partial(self.A)
            mark_partial(self.Bt)

    def forward(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[S, B, H] and [S, B, H] -> [S, B, H]."""
        tap, pairs = self.factors.weight.tap, Pairs((0,), (self.factors.taking_part,))
        anchor = None if tap is None else tap.anchor
        return ShortcutFunction.apply(base, x, pairs, tap, anchor, self.A, self.Bt)


class ShortcutFunction(torch.autograd.Function):
    """apply(base, x, pairs, tap, anchor, A, Bᵀ)."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        pairs: Pairs,
        tap: Tap | None,
        anchor: Any,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        low, x_NH = Products(pairs, factors), x.reshape(-1, x.shape[-1])
        u_NR = low.narrow(x_NH, x_NH.new_empty(x_NH.shape[0], low.width))
        ctx.save_for_backward(x_NH, u_NR, *factors)
        ctx.pairs, ctx.tap, ctx.shape = pairs, tap, x.shape
        if not low.width:
            return base.view_as(base)
        y_NH = base.reshape(-1, base.shape[-1]).clone()
        low.widen(y_NH, u_NR)
        return y_NH.view(base.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, u_NR, *factors = ctx.saved_tensors
        low = Products(ctx.pairs, factors, ctx.needs_input_grad[5:])
        dy_NH = gradients[0].reshape(x_NH.shape)
        du_NR = low.narrow_gradient(dy_NH, torch.empty_like(u_NR))
        dx = low.add_narrow(torch.zeros_like(x_NH), du_NR).view(ctx.shape) if ctx.needs_input_grad[1] else None
        grad_A, grad_B = low.gradients_A(du_NR, x_NH), low.gradients_B(u_NR, dy_NH)
        return gradients[0], dx, None, None, tapped(ctx, dy_NH, x_NH), *grad_A, *grad_B


class ShortcutLayer(TransformerLayer):
    """megatron-core's layer with shortcuts; it gives the state after attention to the next one."""

    shortcuts: torch.nn.ModuleDict

    def add_shortcuts(self, number: int, specs: Mapping[str, LowRankSpec], hidden: int, wire: Wire, dtype: Any) -> None:
        """Build those of ``specs`` that belong to block ``number``."""
        self.shortcuts = torch.nn.ModuleDict()
        for kind in SHORTCUTS:
            name = f"layers.{number}.shortcut.{kind}"
            if name in specs:
                self.shortcuts[kind] = Shortcut(name, hidden, specs[name], wire, dtype)

    def factors(self) -> list[LowRankFactors]:
        """Those of this block's shortcuts."""
        return [shortcut.factors for shortcut in self.shortcuts.values() if isinstance(shortcut, Shortcut)]

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None = None,
        before: torch.Tensor | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """x [S, B, H] and m' [S, B, H] (None in the first block) -> (y, m), each [S, B, H]."""
        add, x = self.self_attn_bda(self.training, self.config.bias_dropout_fusion), hidden_states
        attention = self.self_attention(self.input_layernorm(x), rotary_pos_emb=rotary_pos_emb, attention_mask=None)
        middle = self._add("residual_1", add(attention, x, self.hidden_dropout), x)
        if before is not None:
            middle = self._add("cross_cut", middle, before)
        out = add(self.mlp(self.pre_mlp_layernorm(middle)), middle, self.hidden_dropout)
        return self._add("cross_in", self._add("residual_2", out, middle), x), middle

    def _add(self, kind: str, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.shortcuts[kind](base, x) if kind in self.shortcuts else base
