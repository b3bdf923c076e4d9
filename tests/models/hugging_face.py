"""transformers' LLaMA with the weights of ours: W + s·BᵀA where a matrix has factors."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megalowrank.config import ModelConfig
from megalowrank.models.build import BuiltModel


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


def effective_weights(model: BuiltModel) -> dict[str, torch.Tensor]:
    """Every logical matrix and vector in float64, with s·BᵀA added where there are factors."""
    tensors = {}
    for tensor in model.tensors:
        count = torch.Size(tensor.shape).numel()
        flat = tensor.parameter.detach().reshape(-1)[tensor.start : tensor.start + count]
        tensors[tensor.name] = flat.view(tensor.shape).double().clone()
    found = {name: value for name, value in tensors.items() if name.endswith(".weight")}
    for layer in model.layers:
        found[f"{layer.name}.weight"] += layer.scale * tensors[f"{layer.name}.B"].t() @ tensors[f"{layer.name}.A"]
    return found


def theirs(name: str) -> str:
    """transformers' name of a logical tensor."""
    if name in ("embedding.weight", "norm.weight", "output.weight"):
        return {"e": "model.embed_tokens.weight", "n": "model.norm.weight", "o": "lm_head.weight"}[name[0]]
    _, number, *path, last = name.split(".")
    place = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
        **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }[".".join(path)]
    return f"model.layers.{number}.{place}.{last}"


def hugging_face(config: ModelConfig, model: BuiltModel, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of the transformers library that must compute the same; in float64 without its float32 islands."""
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
        tie_word_embeddings=False,
        attn_implementation="sdpa" if dtype == torch.float64 else "eager",
    )
    found = LlamaForCausalLM(shape).to(dtype).eval()
    weights = {theirs(name): value.to(dtype) for name, value in effective_weights(model).items()}
    found.load_state_dict(weights, strict=True)
    if dtype == torch.float64:
        found.model.rotary_emb = Rotary(
            (config.hidden_size or 0) // (config.num_attention_heads or 1), config.rotary_base
        )
        for name, module in list(found.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                found.set_submodule(name, Norm(module.weight, config.norm_epsilon))
    return found
