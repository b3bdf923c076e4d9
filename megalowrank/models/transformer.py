"""A decoder of any family of ``architecture.py`` on megatron-core's TransformerLayer."""

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
from megalowrank.models.architecture import architecture
from megalowrank.models.layers import CausalAttention, GroupedSelfAttention, ParallelResidualLayer, rotary_angles
from megalowrank.models.norms import norm_class

Chosen = dict[str, LowRankSpec | None]


def transformer_config(config: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of the blocks; weights are left for ``build`` to draw."""
    shape = architecture(config)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        normalization=shape.norm,
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=shape.gated,
        activation_func=shape.activation,
        add_bias_linear=shape.biases,
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
    """The fused projections of one block: (logical name, rows of W) of each matrix, in order of computation."""
    head = (config.hidden_size or 0) // (config.num_attention_heads or 1)
    queries, keys = head * (config.num_attention_heads or 1), head * (config.num_query_groups or 1)
    ffn, hidden = config.ffn_hidden_size or 0, config.hidden_size or 0
    first: dict[str, Blocks] = {"mlp.up": (("up", ffn),)}
    if architecture(config).gated:
        first = {"mlp.gate_up": (("gate", ffn), ("up", ffn))}
    return {
        "attention.qkv": (("q", queries), ("k", keys), ("v", keys)),
        "attention.o": (("o", hidden),),
        **first,
        "mlp.down": (("down", hidden),),
    }


def block_spec(config: ModelConfig, chosen: Chosen) -> ModuleSpec:
    """The modules of one transformer block, with low-rank factors where ``chosen`` has a spec."""
    shape = architecture(config)
    norm = norm_class(shape.norm, config.norm_impl)
    parameters: list[dict[str, Any]] = [
        {"blocks": blocks, "lowrank": chosen[name]} for name, blocks in projections(config).items()
    ]
    qkv, o, first, down = parameters
    attention = SelfAttentionSubmodules(
        linear_qkv=partial(LowRankColumnParallelLinear, **qkv),
        core_attention=CausalAttention,
        linear_proj=ModuleSpec(module=LowRankRowParallelLinear, params=o),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=ModuleSpec(module=LowRankColumnParallelLinear, params=first),
        linear_fc2=ModuleSpec(module=LowRankRowParallelLinear, params=down),
    )
    return ModuleSpec(
        module=ParallelResidualLayer if shape.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=GroupedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def token_losses(logits_SBV: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token [S, B]; float64 takes torch's, since megatron-core's works in float32."""
    if logits_SBV.dtype == torch.float64:
        return F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view_as(labels_SB)
    return vocab_parallel_cross_entropy(logits_SBV, labels_SB)


class Transformer(torch.nn.Module):
    """Tokens [B, S + 1] -> mean next-token cross-entropy in nats (scalar, float32 or float64).

    ``config`` is one that ``architecture.completed`` returns. A tied head is a second module around the one
    embedding parameter, so that an engine that gathers parameters module by module finds it in both.
    """

    def __init__(
        self, config: ModelConfig, length: int, chosen: list[Chosen], recompute: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape, core = architecture(config), transformer_config(config, dtype)
        vocabulary, hidden = config.vocab_size, core.hidden_size
        self.recompute = recompute
        self.embedding = VocabParallelEmbedding(vocabulary, hidden, init_method=core.init_method, config=core)
        self.position: torch.nn.Embedding | None = None
        if shape.rotary_percent is None:
            self.position = torch.nn.Embedding(config.max_position_embeddings or length, hidden, dtype=dtype)
        self.layers = torch.nn.ModuleList(_block(config, core, choice, number) for number, choice in enumerate(chosen))
        self.norm = norm_class(shape.norm, config.norm_impl)(core, hidden, eps=core.layernorm_epsilon)
        self.output = ColumnParallelLinear(
            hidden, vocabulary, config=core, init_method=core.init_method, bias=False,
            skip_weight_param_allocation=shape.tied_output,
        )  # fmt: skip
        if shape.tied_output:
            self.output.weight = self.embedding.weight
        self.angles: torch.Tensor | None = None
        if shape.rotary_percent is not None:
            angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            self.angles = rotary_angles(config.rotary_width(), length, config.rotary_base or 0.0, angle_dtype)

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, V]."""
        hidden = self.embedding(tokens_BS).transpose(0, 1)
        if self.position is not None:
            places = torch.arange(hidden.shape[0], device=hidden.device)
            hidden = hidden + self.position(places)[:, None, :]
        hidden = hidden.contiguous()
        if self.angles is not None and self.angles.device != hidden.device:
            self.angles = self.angles.to(hidden.device)
        angles = None if self.angles is None else self.angles[: hidden.shape[0]]
        for layer in self.layers:
            hidden = self._run(layer, hidden, angles)
        return self.output(self.norm(hidden))[0]

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of tokens 1.. given those before."""
        logits_SBV = self.logits(tokens_BT[:, :-1])
        labels_SB = tokens_BT[:, 1:].t().contiguous()
        return token_losses(logits_SBV, labels_SB).mean()

    def _run(self, layer: torch.nn.Module, hidden: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
        if self.recompute and self.training:
            return checkpoint(_apply, layer, hidden, angles, use_reentrant=False)
        return _apply(layer, hidden, angles)


def _block(config: ModelConfig, core: TransformerConfig, chosen: Chosen, number: int) -> Any:
    """One block whose linears add their bias themselves.

    megatron-core would hand some biases to the caller, for fusions that are off here. A product with its bias is
    one kernel, and ZeRO-3 would have to gather such a bias again after its module is done.
    """
    block = build_module(block_spec(config, chosen), config=core, layer_number=number + 1)
    for linear in block.modules():
        if isinstance(linear, (LowRankColumnParallelLinear, LowRankRowParallelLinear)):
            linear.skip_bias_add = False
    return block


def _apply(layer: Any, hidden: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    return layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0]
