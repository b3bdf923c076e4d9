"""LLaMA on megatron-core's TransformerLayer: RMSNorm, rotary, SwiGLU, grouped-query attention, untied head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint

from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.linear import Blocks, LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.models.layers import CausalAttention, GroupedSelfAttention, RMSNorm, rotary_angles

Chosen = dict[str, LowRankSpec | None]


def transformer_config(config: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of the blocks; weights are left for ``build`` to draw."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def projections(config: ModelConfig) -> dict[str, Blocks]:
    """The fused projections of one block: (logical name, rows of W) of each matrix, in order."""
    head = (config.hidden_size or 0) // (config.num_attention_heads or 1)
    queries, keys = head * (config.num_attention_heads or 1), head * (config.num_query_groups or 1)
    ffn, hidden = config.ffn_hidden_size or 0, config.hidden_size or 0
    return {
        "attention.qkv": (("q", queries), ("k", keys), ("v", keys)),
        "attention.o": (("o", hidden),),
        "mlp.gate_up": (("gate", ffn), ("up", ffn)),
        "mlp.down": (("down", hidden),),
    }


def block_spec(blocks: dict[str, Blocks], chosen: Chosen) -> ModuleSpec:
    """The modules of one transformer block, with low-rank factors where ``chosen`` has a spec."""

    def linear(kind: type, name: str) -> ModuleSpec:
        return ModuleSpec(module=kind, params={"blocks": blocks[name], "lowrank": chosen[name]})

    attention = SelfAttentionSubmodules(
        linear_qkv=partial(
            LowRankColumnParallelLinear, blocks=blocks["attention.qkv"], lowrank=chosen["attention.qkv"]
        ),
        core_attention=CausalAttention,
        linear_proj=linear(LowRankRowParallelLinear, "attention.o"),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=linear(LowRankColumnParallelLinear, "mlp.gate_up"),
        linear_fc2=linear(LowRankRowParallelLinear, "mlp.down"),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=GroupedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def token_losses(logits_SBV: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token [S, B]; float64 takes torch's, since megatron-core's works in float32."""
    if logits_SBV.dtype == torch.float64:
        return F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view_as(labels_SB)
    return vocab_parallel_cross_entropy(logits_SBV, labels_SB)


class Llama(torch.nn.Module):
    """Tokens [B, S + 1] -> mean next-token cross-entropy in nats (scalar, float32 or float64)."""

    def __init__(
        self, config: ModelConfig, length: int, chosen: list[Chosen], recompute: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        core = transformer_config(config, dtype)
        blocks = projections(config)
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self.recompute = recompute
        self.embedding = VocabParallelEmbedding(vocabulary, hidden, init_method=core.init_method, config=core)
        self.layers = torch.nn.ModuleList(
            build_module(block_spec(blocks, choice), config=core, layer_number=number + 1)
            for number, choice in enumerate(chosen)
        )
        self.norm = RMSNorm(core, core.hidden_size, eps=config.norm_epsilon)
        self.output = ColumnParallelLinear(hidden, vocabulary, config=core, init_method=core.init_method, bias=False)
        head = core.hidden_size // core.num_attention_heads
        angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.angles = rotary_angles(head, length, config.rotary_base, angle_dtype)

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, V]."""
        hidden = self.embedding(tokens_BS).transpose(0, 1).contiguous()
        if self.angles.device != hidden.device:
            self.angles = self.angles.to(hidden.device)
        angles = self.angles[: hidden.shape[0]]
        for layer in self.layers:
            hidden = self._block(layer, hidden, angles)
        return self.output(self.norm(hidden))[0]

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of tokens 1.. given those before."""
        logits_SBV = self.logits(tokens_BT[:, :-1])
        labels_SB = tokens_BT[:, 1:].t().contiguous()
        return token_losses(logits_SBV, labels_SB).mean()

    def _block(self, layer: torch.nn.Module, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        if self.recompute and self.training:
            return checkpoint(_apply, layer, hidden, angles, use_reentrant=False)
        return _apply(layer, hidden, angles)


def _apply(layer: Any, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0]
