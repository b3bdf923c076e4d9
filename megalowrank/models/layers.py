"""The pieces of a transformer block that megatron-core hard-wires to CUDA, device-agnostic, or does not have.

Shapes: S sequence, B batch, N query heads, G key/value heads, D head size, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer


class CausalAttention(torch.nn.Module):
    """torch's scaled dot product attention in megatron-core's ``core_attention`` slot."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Causal attention; returns [S, B, N·D]."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_SBND, key_SBGD, value_SBGD))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(query_SBND.shape[0], query_SBND.shape[1], -1)


class GroupedSelfAttention(SelfAttention):
    """megatron-core's self-attention with Q, K and V as three row blocks of the fused weight.

    megatron-core interleaves them by query group; as blocks each logical matrix is contiguous, which
    is what per-matrix factors, folds and checkpoints want.
    """

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> query [S, B, N, D], key and value [S, B, G, D]."""
        mixed, _ = self.linear_qkv(hidden_states)
        head = self.hidden_size_per_attention_head
        groups = self.num_query_groups_per_partition
        queries = self.num_attention_heads_per_partition
        q, k, v = mixed.split([queries * head, groups * head, groups * head], dim=-1)
        lead = mixed.shape[:-1]
        return q.view(*lead, queries, head), k.view(*lead, groups, head), v.view(*lead, groups, head)


class ParallelResidualLayer(TransformerLayer):
    """megatron-core's layer with attention and MLP side by side: y = x + attention(norm₁ x) + mlp(norm₂ x)."""

    def forward(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> ([S, B, H], no context)."""
        attention = self.self_attention(
            self.input_layernorm(hidden_states), rotary_pos_emb=rotary_pos_emb, attention_mask=None
        )
        mlp = self.mlp(self.pre_mlp_layernorm(hidden_states))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(mlp, add(attention, hidden_states, self.hidden_dropout), self.hidden_dropout), None


def rotary_angles(width: int, length: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """Angles of the rotary embedding of ``width`` elements of a head, half-split order: [length, 1, 1, width]."""
    inverse = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    return torch.cat((angles, angles), -1)[:, None, None, :].to(dtype)
