"""Which tensor of a Hugging Face model holds which of our logical tensors, and in what order of elements.

GPT-2 keeps the weights of its blocks transposed, with Q, K and V as blocks; GPT-NeoX has Q, K and V of a head side by
side. OPT's table of positions begins with rows that are read where a text is padded. Pure functions of a completed
``ModelConfig``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megalowrank.config import ModelConfig
from megalowrank.models.architecture import architecture
from megalowrank.models.projections import input_width, projections

Reader = Callable[[str, tuple[int, ...]], torch.Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Names:
    """Names of a family: ``outer`` by logical module, ``block`` by the logical matrices a module fuses.

    ``prefix`` is that of the model without its head; names of an older file may lack it. ``unread_positions`` rows
    come before those of the learned positions. Only padding reads them, which no other token sees: they are zeros in
    what is written, and not taken over.
    """

    model_type: str
    prefix: str
    blocks: str
    outer: dict[str, str]
    block: dict[tuple[str, ...], str]
    transposed: bool = False
    by_head: bool = False
    buffers: tuple[str, ...] = ()
    unread_positions: int = 0


_QKV = ("attention.q", "attention.k", "attention.v")
FAMILY_NAMES: dict[str, Names] = {
    "llama": Names(
        model_type="llama", prefix="model.", blocks="model.layers",
        outer={"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
        block={
            ("input_layernorm",): "input_layernorm", ("pre_mlp_layernorm",): "post_attention_layernorm",
            ("attention.q",): "self_attn.q_proj", ("attention.k",): "self_attn.k_proj",
            ("attention.v",): "self_attn.v_proj", ("attention.o",): "self_attn.o_proj",
            ("mlp.gate",): "mlp.gate_proj", ("mlp.up",): "mlp.up_proj", ("mlp.down",): "mlp.down_proj",
        },
        buffers=("rotary_emb.inv_freq",),
    ),
    "gpt2": Names(
        model_type="gpt2", prefix="transformer.", blocks="transformer.h", transposed=True,
        outer={
            "embedding": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            ("input_layernorm",): "ln_1", ("pre_mlp_layernorm",): "ln_2",
            _QKV: "attn.c_attn", ("attention.o",): "attn.c_proj",
            ("mlp.up",): "mlp.c_fc", ("mlp.down",): "mlp.c_proj",
        },
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "neox": Names(
        model_type="gpt_neox", prefix="gpt_neox.", blocks="gpt_neox.layers", by_head=True,
        outer={"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        block={
            ("input_layernorm",): "input_layernorm", ("pre_mlp_layernorm",): "post_attention_layernorm",
            _QKV: "attention.query_key_value", ("attention.o",): "attention.dense",
            ("mlp.up",): "mlp.dense_h_to_4h", ("mlp.down",): "mlp.dense_4h_to_h",
        },
        buffers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
    "opt": Names(
        model_type="opt", prefix="model.", blocks="model.decoder.layers", unread_positions=2,
        outer={
            "embedding": "model.decoder.embed_tokens", "position": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm", "output": "lm_head",
        },
        block={
            ("input_layernorm",): "self_attn_layer_norm", ("pre_mlp_layernorm",): "final_layer_norm",
            ("attention.q",): "self_attn.q_proj", ("attention.k",): "self_attn.k_proj",
            ("attention.v",): "self_attn.v_proj", ("attention.o",): "self_attn.out_proj",
            ("mlp.up",): "fc1", ("mlp.down",): "fc2",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of the Hugging Face model: logical tensors as row blocks, cut into ``heads`` groups of rows each.

    ``unread`` rows come before them, of which none of ours knows.
    """

    name: str
    parts: tuple[str, ...]
    shapes: tuple[Shape, ...]
    heads: int = 1
    transposed: bool = False
    unread: int = 0

    @property
    def shape(self) -> Shape:
        """As it is in the file."""
        rows = self.unread + sum(shape[0] for shape in self.shapes)
        return (self.shapes[0][1], rows) if self.transposed else (rows, *self.shapes[0][1:])

    def join(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor made of its parts."""
        rows = torch.cat([value.unflatten(0, (self.heads, -1)) for value in values], 1).flatten(0, 1)
        if self.unread:
            rows = torch.cat((rows.new_zeros(self.unread, *rows.shape[1:]), rows))
        return (rows.t() if self.transposed else rows).contiguous()

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The parts of the tensor."""
        rows = (value.t() if self.transposed else value)[self.unread :].unflatten(0, (self.heads, -1))
        parts = rows.split([shape[0] // self.heads for shape in self.shapes], 1)
        return [part.flatten(0, 1).contiguous() for part in parts]


def names_of(config: ModelConfig) -> Names:
    """The names of the family of ``config``."""
    return FAMILY_NAMES[config.model_family or "llama"]


def logical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every logical tensor of a model without factors."""
    shape, hidden, vocabulary = architecture(config), config.hidden_size or 0, config.vocab_size or 0
    found: dict[str, Shape] = {"embedding.weight": (vocabulary, hidden)}
    if shape.rotary_percent is None:
        found["position.weight"] = (config.max_position_embeddings or 0, hidden)
    norm = ("weight",) if shape.norm == "RMSNorm" else ("weight", "bias")
    for number in range(config.num_layers or 0):
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            found.update({f"layers.{number}.{name}.{kind}": (hidden,) for kind in norm})
        found.update(_linears(config, number, shape.biases))
    found.update({f"norm.{kind}": (hidden,) for kind in norm})
    if config.num_labels is not None:
        found["score.weight"] = (config.num_labels, hidden)
    elif not shape.tied_output:
        found["output.weight"] = (vocabulary, hidden)
    return found


def _linears(config: ModelConfig, number: int, biases: bool) -> Iterator[tuple[str, Shape]]:
    for projection, parts in projections(config).items():
        for part, rows in parts:
            name = f"layers.{number}.{projection.split('.')[0]}.{part}"
            yield f"{name}.weight", (rows, input_width(config, projection))
            if biases:
                yield f"{name}.bias", (rows,)


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Every tensor of the Hugging Face model; a tied head is not stored."""
    names, shapes = names_of(config), logical_shapes(config)
    found: list[Stored] = []
    for module, path in {**names.outer, "score": "score"}.items():
        unread = names.unread_positions if module == "position" else 0
        found += [replace(stored, unread=unread) for stored in _stored(path, (module,), shapes)]
    heads = config.num_attention_heads or 1
    for number in range(config.num_layers or 0):
        for parts, path in names.block.items():
            logical = tuple(f"layers.{number}.{part}" for part in parts)
            fused = heads if names.by_head and len(parts) > 1 else 1
            turned = names.transposed and "layernorm" not in parts[0]
            found += _stored(f"{names.blocks}.{number}.{path}", logical, shapes, fused, turned)
    return found


def _stored(
    path: str, modules: tuple[str, ...], shapes: dict[str, Shape], heads: int = 1, transposed: bool = False
) -> Iterator[Stored]:
    for kind in ("weight", "bias"):
        parts = tuple(f"{module}.{kind}" for module in modules)
        if parts[0] in shapes:
            turned = transposed and kind == "weight"
            yield Stored(f"{path}.{kind}", parts, tuple(shapes[part] for part in parts), heads, turned)
