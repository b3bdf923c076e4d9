"""A decoder of any family of ``architecture.py`` on megatron-core's TransformerLayer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
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
from megalowrank.lowrank.fold import FrozenTensor
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.models.architecture import architecture
from megalowrank.models.layers import CausalAttention, GroupedSelfAttention, ParallelResidualLayer, rotary_angles
from megalowrank.models.norms import norm_class
from megalowrank.models.projections import input_width, projections
from megalowrank.models.shortcuts import ShortcutLayer
from megalowrank.models.task_head import TaskHead
from megalowrank.models.vocabulary import Head, WordEmbedding, token_losses
from megalowrank.parallel.partition import share
from megalowrank.parallel.wire import Wire, mark_partial

Chosen = dict[str, tuple[LowRankSpec | None, ...] | None]


@dataclass(frozen=True)
class Placement:
    """The part of the model that a rank builds: its wire and the blocks [first, stop) of its pipeline stage.

    ``begins`` with the embedding, ``ends`` with the head. ``ride`` says of each projection whether its low-rank
    products ride (see ``Wire``); those not named do. The default is the whole model.
    """

    wire: Wire = field(default_factory=Wire)
    blocks: tuple[int, int] | None = None
    begins: bool = True
    ends: bool = True
    ride: dict[str, bool] = field(default_factory=dict)

    def numbers(self, layers: int) -> range:
        """Global numbers of the blocks of this stage, of ``layers`` in all."""
        return range(*(self.blocks or (0, layers)))


def transformer_config(config: ModelConfig, dtype: torch.dtype, wire: Wire) -> TransformerConfig:
    """megatron-core's configuration of the blocks; weights are left for ``build`` to draw."""
    shape = architecture(config)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=share(config.ffn_hidden_size or 0, wire.rank, wire.size).padded * wire.size,
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
        tensor_model_parallel_size=wire.size,
        sequence_parallel=wire.sequence,
    )


def block_spec(config: ModelConfig, chosen: Chosen, place: Placement) -> ModuleSpec:
    """The modules of one transformer block, with low-rank factors where ``chosen`` has a spec."""
    shape = architecture(config)
    norm = norm_class(shape.norm, config.norm_impl)
    parameters: list[dict[str, Any]] = [
        {
            "blocks": blocks,
            "columns": input_width(config, name),
            "lowrank": chosen[name],
            "wire": place.wire.schedule(place.ride.get(name, True)),
        }
        for name, blocks in projections(config).items()
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


class Transformer(torch.nn.Module):
    """A decoder, or the part of it that one pipeline stage holds.

    Whole: tokens [B, S + 1] -> mean next-token cross-entropy in nats (scalar, float32 or float64); with
    ``config.num_labels`` rows of ``data.labelled_batches`` -> the loss of ``TaskHead``. ``config`` is one
    that ``architecture.completed`` returns; ``chosen`` has an entry for every block of the model. A tied head is a
    second module around the one embedding parameter, so that an engine that gathers parameters module by module
    finds it in both; the last of several stages has a copy of that parameter. Between blocks activations are
    [S, B, H], under sequence parallelism this rank's part of S.
    """

    def __init__(
        self,
        config: ModelConfig,
        length: int,
        chosen: Sequence[Chosen],
        recompute: bool,
        dtype: torch.dtype,
        place: Placement,
        shortcuts: Mapping[str, LowRankSpec] | None = None,
    ) -> None:
        super().__init__()
        shape, core, wire = architecture(config), transformer_config(config, dtype, place.wire), place.wire
        hidden = core.hidden_size
        self.frozen: list[FrozenTensor] = []
        self.recompute, self.wire, self.place = recompute, wire, place
        self.labelled = config.num_labels is not None
        self.vocabulary = share(config.vocab_size or 0, wire.rank, wire.size)
        self.embedding: Any = None
        if place.begins or (place.ends and shape.tied_output):
            self.embedding = WordEmbedding(self.vocabulary, hidden, wire, core)
        self.position: torch.nn.Embedding | None = None
        if place.begins and shape.rotary_percent is None:
            self.position = torch.nn.Embedding(config.max_position_embeddings or length, hidden, dtype=dtype)
        self.numbers = place.numbers(core.num_layers)
        self.shortcuts = dict(shortcuts or {})
        self.layers = torch.nn.ModuleList(
            _block(config, core, chosen[i], i, place, self.shortcuts) for i in self.numbers
        )
        self.norm: Any = None
        self.output: Any = None
        if place.ends:
            self.norm = norm_class(shape.norm, config.norm_impl)(core, hidden, eps=core.layernorm_epsilon)
            self.output = _head(config, core, wire, dtype, self.embedding.weight if shape.tied_output else None)
        if wire.sequence:
            self._mark_partial()
        self.angles: torch.Tensor | None = None
        if shape.rotary_percent is not None:
            angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            self.angles = rotary_angles(config.rotary_width(), length, config.rotary_base or 0.0, angle_dtype)

    def _mark_partial(self) -> None:
        """With the sequence split, norms and positions see only this rank's part of it."""
        names = ("input_layernorm", "pre_mlp_layernorm")
        norms = [block.get_submodule(name) for block in self.layers for name in names]
        for module in (*norms, self.norm, self.position):
            for parameter in () if module is None else module.parameters():
                mark_partial(parameter)

    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, H]."""
        return self.add_positions(self.embedding(tokens_BS))

    def add_positions(self, hidden: torch.Tensor) -> torch.Tensor:
        """Learned positions, if the family has them."""
        if self.position is None:
            return hidden
        first = self.wire.rank * hidden.shape[0] if self.wire.sequence else 0
        places = torch.arange(first, first + hidden.shape[0], device=hidden.device)
        return (hidden + self.position(places)[:, None, :]).contiguous()

    def run_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """The blocks of this stage; with shortcuts two states go from stage to stage, [2, S, B, H]."""
        if self.angles is not None and self.angles.device != hidden.device:
            self.angles = self.angles.to(hidden.device)
        middle = None
        if self.shortcuts and not self.place.begins:
            hidden, middle = hidden.unbind(0)
        length = hidden.shape[0] * (self.wire.size if self.wire.sequence else 1)
        angles = None if self.angles is None else self.angles[:length]
        for layer in self.layers:
            hidden, middle = self._run(layer, hidden, angles, middle)
        return hidden if middle is None or self.place.ends else torch.stack((hidden, middle))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> logits [S, B, V], this rank's rows of the vocabulary."""
        return self.output(self.norm(hidden))[0]

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, V]."""
        return self.head(self.run_blocks(self.embed(tokens_BS)))

    def parted(self, batch_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [B, S] of a batch and what ``loss`` compares with: tokens [B, S], or lengths and labels [B, 2]."""
        if self.labelled:
            return batch_BT[:, :-2], batch_BT[:, -2:]
        return batch_BT[:, :-1], batch_BT[:, 1:]

    def loss(self, logits_SBV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the labels; of a task its own loss."""
        if isinstance(self.output, TaskHead):
            return self.output.loss(logits_SBV, labels_BS)
        return token_losses(logits_SBV, labels_BS.t().contiguous(), self.vocabulary, self.wire).mean()

    def forward(self, batch_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of tokens 1.. given those before, or the loss of the task."""
        inputs_BS, labels = self.parted(batch_BT)
        return self.loss(self.logits(inputs_BS), labels)

    def _run(
        self, layer: torch.nn.Module, hidden: torch.Tensor, angles: torch.Tensor | None, middle: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The state after a block, and with shortcuts that in its middle."""
        apply = _apply_with_shortcuts if self.shortcuts else _apply
        if self.recompute and self.training:
            return checkpoint(apply, layer, hidden, angles, middle, use_reentrant=False)
        return apply(layer, hidden, angles, middle)


def _head(
    config: ModelConfig, core: TransformerConfig, wire: Wire, dtype: torch.dtype, tied: torch.nn.Parameter | None
) -> Head | TaskHead:
    """The output projection, of which ``tied`` is the weight it shares, or the head of the task."""
    if config.num_labels is not None:
        return TaskHead(core.hidden_size, config.num_labels, wire, dtype)
    vocabulary = config.vocab_size or 0
    rows = share(vocabulary, wire.rank, wire.size).padded * wire.size
    head = Head(
        core.hidden_size, rows, config=core, init_method=core.init_method, bias=False,
        skip_weight_param_allocation=tied is not None,
        blocks=(("output", vocabulary),), columns=core.hidden_size, lowrank=None, wire=wire,
    )  # fmt: skip
    if tied is not None:
        head.weight = tied
    return head


def _block(
    config: ModelConfig,
    core: TransformerConfig,
    chosen: Chosen,
    number: int,
    place: Placement,
    shortcuts: Mapping[str, LowRankSpec],
) -> Any:
    """One block whose linears add their bias themselves.

    megatron-core would hand some biases to the caller, for fusions that are off here. A product with its bias is
    one kernel, and ZeRO-3 would have to gather such a bias again after its module is done.
    """
    spec = block_spec(config, chosen, place)
    if shortcuts:
        spec.module = ShortcutLayer
    block = build_module(spec, config=core, layer_number=number + 1)
    if shortcuts:
        block.add_shortcuts(number, shortcuts, core.hidden_size, place.wire, core.params_dtype)
    for linear in block.modules():
        if isinstance(linear, (LowRankColumnParallelLinear, LowRankRowParallelLinear)):
            linear.skip_bias_add = False
    return block


def _apply(
    layer: Any, hidden: torch.Tensor, angles: torch.Tensor | None, middle: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    return layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0], None


def _apply_with_shortcuts(
    layer: Any, hidden: torch.Tensor, angles: torch.Tensor | None, middle: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return layer(hidden, rotary_pos_emb=angles, before=middle)
