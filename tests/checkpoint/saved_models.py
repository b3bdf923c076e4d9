"""Checkpoints of models that nobody trained: any family, method and precision, with the model to compare with."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.plain import new_run
from megalowrank.checkpoint.write import SoloRanks, save_checkpoint
from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import folded_weights
from megalowrank.lowrank.fold import join_residual
from megalowrank.methods import method_class
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import BuiltModel, build_model

LENGTH, WORDS, STEP, BATCH = 21, 70, 7, 4
SHAPE = ModelConfig(num_layers=2, hidden_size=48, num_attention_heads=3, vocab_size=WORDS, init_method_std=0.15)
# every size differs from every other; a head has 16 elements
CONFIGS = {
    "llama": replace(SHAPE, model_family="llama", ffn_hidden_size=52, rotary_base=500.0, norm_epsilon=1e-3),
    "llama, tied, grouped": replace(
        SHAPE, model_family="llama", num_attention_heads=6, num_query_groups=2, ffn_hidden_size=52,
        tie_word_embeddings=True,
    ),
    "gpt2": replace(SHAPE, model_family="gpt2", max_position_embeddings=29),
    "gpt2, not tied": replace(
        SHAPE, model_family="gpt2", tie_word_embeddings=False, ffn_hidden_size=52, norm_epsilon=1e-3
    ),
    "neox": replace(
        SHAPE, model_family="neox", ffn_hidden_size=52, rotary_percent=0.5, rotary_base=500.0, norm_epsilon=1e-3
    ),
    "neox, tied": replace(SHAPE, model_family="neox", tie_word_embeddings=True),
    "opt": replace(SHAPE, model_family="opt", max_position_embeddings=29),
}  # fmt: skip
CONFIGS = {name: completed(config, FAMILIES, LENGTH) for name, config in CONFIGS.items()}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 5, "lora_alpha": 3.0},
    "switchlora": {"lora_rank": 4},
    "relora": {"lora_rank": 6, "lora_alpha": 2.0},
    "galore": {"lora_rank": 5},
    "heterolora": {"lora_rank": 5},
}


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def save_model(
    config: ModelConfig,
    method: str,
    folder: Path,
    low: bool = False,
    tokenizer: str | None = None,
    state_of_method: dict[str, Any] | None = None,
    **flags: Any,
) -> BuiltModel:
    """Write a checkpoint; the model returned has the W that stands in it, residuals joined."""
    kind = method_class(method)
    settings = kind.config_class(**{**METHODS[method], **flags})
    forward = torch.bfloat16 if low else torch.float32
    model = build_model(config, kind(settings), length=LENGTH, seed=1, forward_dtype=forward)
    _disturb(model)
    run = new_run(config, LENGTH, tokenizer, method, asdict(settings))
    run["train"]["global_batch_size"] = BATCH
    state = {"attempts": STEP, "updates": STEP, "method_state": state_of_method or {}, "run": run}
    save_checkpoint(folder, STEP, _pieces(model, low), state, SoloRanks())
    for folded in folded_weights(model.layers):
        if folded.residual is not None:
            whole = join_residual(folded.parameter.data.bfloat16().view(-1), folded.residual)
            folded.parameter.data.copy_(whole.view_as(folded.parameter))
    return model


def _disturb(model: BuiltModel) -> None:
    """Norms that differ from ones, biases from zeros, and factors that do not cancel against W."""
    source = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in model.tensors:
            if not tensor.name.endswith(".weight") or len(tensor.shape) == 1:
                part = tensor.parameter.view(-1)[tensor.start : tensor.start + tensor.numel]
                part.add_(torch.randn(tensor.numel, generator=source), alpha=0.2)


def _pieces(model: BuiltModel, low: bool) -> list[Piece]:
    frozen = {id(folded.parameter): folded for folded in folded_weights(model.layers)}
    found = []
    for tensor in model.tensors:
        value = tensor.parameter.data.view(-1)[tensor.start : tensor.start + tensor.numel].view(tensor.shape)
        folded = frozen.get(id(tensor.parameter))
        if folded is None:
            found.append(Piece.whole(f"master/{tensor.name}", value))
            continue
        found.append(Piece.whole(f"weight/{tensor.name}", value.bfloat16() if low else value))
        if folded.residual is not None:
            rest = folded.residual[tensor.start : tensor.start + tensor.numel]
            found.append(Piece.whole(f"residual/{tensor.name}", rest.view(tensor.shape)))
    return found
