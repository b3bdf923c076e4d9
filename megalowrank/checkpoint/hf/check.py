"""Whether two models compute the same: logits on sequences drawn from the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megalowrank.errors import TrainingError
from megalowrank.models.build import BuiltModel

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by some 1e-6
_ROWS, _LONGEST, _SEED = 3, 128, 1


def probes(vocabulary: int, length: int) -> torch.Tensor:
    """Token ids [3, T], always the same; T is ``length``, at most 128."""
    source = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocabulary, (_ROWS, min(length, _LONGEST)), generator=source)


@torch.no_grad()
def our_logits(model: BuiltModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of a model of ours."""
    return model.module.logits(tokens_BS).transpose(0, 1)


@torch.no_grad()
def foreign_logits(folder: Path, tokens_BS: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """Logits [B, S, V] of the model in ``folder``, with the adapter in ``adapter``, as transformers computes them.

    Float32, from safetensors alone; code that comes with a model is never run.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, use_safetensors=True)
    return model.eval()(tokens_BS).logits


def padded_probes(vocabulary: int, length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, T], padded on the right with ``padding``, which none of the real ones is, and lengths [3]."""
    tokens_BS = probes(vocabulary, length)
    tokens_BS = torch.where(tokens_BS == padding, (padding + 1) % vocabulary, tokens_BS)
    width = tokens_BS.shape[1]
    lengths_B = torch.tensor([width, 1 + width // 2, 1])
    return tokens_BS.masked_fill(torch.arange(width) >= lengths_B[:, None], padding), lengths_B


@torch.no_grad()
def our_scores(model: BuiltModel, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] of a model of ours with the head of a task."""
    return model.module.output.last(model.module.logits(tokens_BS), lengths_B)


@torch.no_grad()
def foreign_scores(folder: Path, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """As ``foreign_logits``, of a model for sequences: [B, K]."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    mask = torch.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    return model.eval()(tokens_BS, attention_mask=mask.long()).logits


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits; TrainingError if it is more than rounding explains."""
    if found.shape != expected.shape:
        raise TrainingError(f"logits have shape {tuple(found.shape)} after conversion, {tuple(expected.shape)} before")
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:
        raise TrainingError(
            f"the converted model computes something else: logits up to {scale:.4g} differ by {difference:.3g}, "
            f"allowed are {TOLERANCE * scale:.3g}; nothing was written"
        )
    return difference
