"""Models of the transformers library with the weights of ours: W + s·BᵀA where a matrix has factors.

GPT-NeoX interleaves Q, K and V by head in one weight, GPT-2 has them as column blocks of a transposed one.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megalowrank.config import ModelConfig
from megalowrank.models.build import BuiltModel

Tensors = dict[str, torch.Tensor]


class Rotary(torch.nn.Module):
    """cos and sin in the type of the model; transformers works in float32 whatever that is."""

    def __init__(self, head: int, base: float) -> None:
        super().__init__()
        self.frequencies = 1.0 / base ** (torch.arange(0, head, 2, dtype=torch.float64) / head)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Norm(torch.nn.Module):
    """RMSNorm in the type of the model; transformers works in float32 whatever that is."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.epsilon))


def logical(model: BuiltModel, gradients: bool = False) -> Tensors:
    """Every logical tensor, or its gradient, in float64."""
    tensors = {}
    for tensor in model.tensors:
        count = torch.Size(tensor.shape).numel()
        source = tensor.parameter.grad if gradients else tensor.parameter.detach()
        if source is not None:
            flat = source.reshape(-1)[tensor.start : tensor.start + count]
            tensors[tensor.name] = flat.view(tensor.shape).double().clone()
    return tensors


def effective_weights(model: BuiltModel) -> Tensors:
    """Every logical matrix and vector in float64, with s·BᵀA added where there are factors."""
    tensors = logical(model)
    found = {name: value for name, value in tensors.items() if name.endswith((".weight", ".bias"))}
    for layer in model.layers:
        found[f"{layer.name}.weight"] += layer.scale * tensors[f"{layer.name}.B"].t() @ tensors[f"{layer.name}.A"]
    return found


# transformers' name of what is no part of a block, and of what is: {} is the number of the block
LLAMA = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "input_layernorm": "model.layers.{}.input_layernorm",
    "pre_mlp_layernorm": "model.layers.{}.post_attention_layernorm",
    **{f"attention.{part}": f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkvo"},
    **{f"mlp.{part}": f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
GPT2 = {
    "embedding": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f", "output": "lm_head",
    "input_layernorm": "transformer.h.{}.ln_1", "pre_mlp_layernorm": "transformer.h.{}.ln_2",
    "attention.qkv": "transformer.h.{}.attn.c_attn", "attention.o": "transformer.h.{}.attn.c_proj",
    "mlp.up": "transformer.h.{}.mlp.c_fc", "mlp.down": "transformer.h.{}.mlp.c_proj",
}  # fmt: skip
NEOX = {
    "embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "output": "lm_head",
    "input_layernorm": "gpt_neox.layers.{}.input_layernorm",
    "pre_mlp_layernorm": "gpt_neox.layers.{}.post_attention_layernorm",
    "attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "attention.o": "gpt_neox.layers.{}.attention.dense",
    "mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h", "mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}  # fmt: skip
OPT = {
    "embedding": "model.decoder.embed_tokens", "position": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm", "output": "lm_head",
    "input_layernorm": "model.decoder.layers.{}.self_attn_layer_norm",
    "pre_mlp_layernorm": "model.decoder.layers.{}.final_layer_norm",
    **{f"attention.{part}": f"model.decoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"},
    "attention.o": "model.decoder.layers.{}.self_attn.out_proj",
    "mlp.up": "model.decoder.layers.{}.fc1", "mlp.down": "model.decoder.layers.{}.fc2",
}  # fmt: skip
PLACES = {"llama": LLAMA, "gpt2": GPT2, "neox": NEOX, "opt": OPT}


def theirs(config: ModelConfig, tensors: Tensors) -> Tensors:
    """Logical tensors, weights or gradients, under the names and in the layouts of transformers."""
    family, heads = config.model_family or "llama", config.num_attention_heads or 1
    fused = _fuse(tensors, heads if family == "neox" else 1) if family in ("gpt2", "neox") else tensors
    found = {}
    for name, value in fused.items():
        number = re.match(r"layers\.(\d+)\.", name)
        place, kind = name[number.end() if number else 0 :].rsplit(".", 1)
        turned = family == "gpt2" and number and value.dim() == 2
        if family == "opt" and place == "position":  # its first two rows are read where a text is padded
            value = F.pad(value, (0, 0, 2, 0))
        path = PLACES[family][place].format(number[1] if number else "")
        found[f"{path}.{kind}"] = value.t() if turned else value
    if "output.weight" not in tensors:
        found["lm_head.weight"] = found[f"{PLACES[family]['embedding']}.weight"]
    return found


def _fuse(tensors: Tensors, heads: int) -> Tensors:
    """Rows of Q, K and V in one tensor, interleaved in ``heads`` groups."""
    found = {}
    for name, value in tensors.items():
        if ".attention.q." in name:
            parts = [tensors[name.replace(".q.", f".{part}.")].unflatten(0, (heads, -1)) for part in "qkv"]
            found[name.replace(".q.", ".qkv.")] = torch.cat(parts, dim=1).flatten(0, 1)
        elif ".attention.k." not in name and ".attention.v." not in name:
            found[name] = value
    return found


def hugging_face(config: ModelConfig, model: BuiltModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the transformers library that must compute the same; in float64 without its float32 islands."""
    found = FACTORIES[config.model_family or "llama"](config, dtype)
    weights = {name: value.to(dtype) for name, value in theirs(config, effective_weights(model)).items()}
    found.load_state_dict(weights, strict=True)
    return found


def _llama(config: ModelConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        max_position_embeddings=512,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        attn_implementation=_attention(dtype),
    )
    found = LlamaForCausalLM(shape).to(dtype).eval()
    if dtype == torch.float64:
        found.model.rotary_emb = Rotary(_head(config), config.rotary_base or 0.0)
        for name, module in list(found.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                found.set_submodule(name, Norm(module.weight, config.norm_epsilon or 0.0))
    return found


def _gpt2(config: ModelConfig, dtype: torch.dtype) -> GPT2LMHeadModel:
    shape = GPT2Config(
        n_embd=config.hidden_size,
        n_inner=config.ffn_hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings is not False,
        attn_implementation=_attention(dtype),
    )
    return GPT2LMHeadModel(shape).to(dtype).eval()


def _neox(config: ModelConfig, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    share = config.rotary_percent or 0.0
    shape = GPTNeoXConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        layer_norm_eps=config.norm_epsilon,
        rope_parameters={
            "rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": share,
        },
        use_parallel_residual=True,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        max_position_embeddings=512,
        attn_implementation=_attention(dtype),
    )  # fmt: skip
    found = GPTNeoXForCausalLM(shape).to(dtype).eval()
    if dtype == torch.float64:
        found.gpt_neox.rotary_emb = Rotary(int(_head(config) * share), config.rotary_base or 0.0)
    return found


def _opt(config: ModelConfig, dtype: torch.dtype) -> OPTForCausalLM:
    shape = OPTConfig(
        hidden_size=config.hidden_size,
        ffn_dim=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        pad_token_id=None,
        attn_implementation=_attention(dtype),
    )
    return OPTForCausalLM(shape).to(dtype).eval()


FACTORIES = {"llama": _llama, "gpt2": _gpt2, "neox": _neox, "opt": _opt}


def _head(config: ModelConfig) -> int:
    return (config.hidden_size or 0) // (config.num_attention_heads or 1)


def _attention(dtype: torch.dtype) -> str:
    """The eager one computes its softmax in float32."""
    return "sdpa" if dtype == torch.float64 else "eager"
