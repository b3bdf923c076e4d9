"""Published model shapes, as a table of numbers.

Sources: configurations of ReLoRA, GaLore and SwitchLoRA (LLaMA, vocabulary 32100, RMSNorm 1e-6, untied head),
Radford et al. 2019 (GPT-2), Biderman et al. 2023 (Pythia), Zhang et al. 2022 (OPT); an MLP of 4 times the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError, unknown_name
from megalowrank.models.architecture import FAMILIES, architecture, completed
from megalowrank.models.norms import norm_class

VOCABULARY = 32100

# hidden, ffn, layers, heads
LLAMA: dict[str, tuple[int, int, int, int]] = {
    "llama_9m": (128, 352, 4, 4),
    "llama_20m": (256, 688, 4, 4),
    "llama_35m": (384, 1024, 6, 8),
    "llama_60m": (512, 1376, 8, 8),
    "llama_130m": (768, 2048, 12, 12),
    "llama_250m": (768, 2560, 24, 16),
    "llama_350m": (1024, 2736, 24, 16),
    "llama_1b": (2048, 5461, 24, 32),
    "llama_3b": (2560, 6848, 32, 32),
    "llama_7b": (4096, 11008, 32, 32),
}

# hidden, layers, heads; vocabulary 50257, 1024 positions
GPT2: dict[str, tuple[int, int, int]] = {
    "gpt2": (768, 12, 12),
    "gpt2_medium": (1024, 24, 16),
    "gpt2_large": (1280, 36, 20),
    "gpt2_xl": (1600, 48, 25),
}

# hidden, layers, heads; vocabulary 50272, 2048 positions
OPT: dict[str, tuple[int, int, int]] = {
    "opt_125m": (768, 12, 12),
    "opt_1.3b": (2048, 24, 32),
}

# hidden, layers, heads, vocabulary (padded for its training)
PYTHIA: dict[str, tuple[int, int, int, int]] = {
    "pythia_14m": (128, 6, 4, 50304),
    "pythia_31m": (256, 6, 8, 50304),
    "pythia_70m": (512, 6, 8, 50304),
    "pythia_160m": (768, 12, 12, 50304),
    "pythia_410m": (1024, 24, 16, 50304),
    "pythia_1b": (2048, 16, 8, 50304),
    "pythia_1.4b": (2048, 24, 16, 50304),
    "pythia_2.8b": (2560, 32, 32, 50304),
    "pythia_6.9b": (4096, 32, 32, 50432),
    "pythia_12b": (5120, 36, 40, 50688),
}


def _presets() -> dict[str, dict[str, Any]]:
    """Every preset as fields of ModelConfig."""
    sizes = ("hidden_size", "num_layers", "num_attention_heads")
    gated = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads")
    llama = {"model_family": "llama", "vocab_size": VOCABULARY}
    gpt2 = {"model_family": "gpt2", "vocab_size": 50257, "max_position_embeddings": 1024}
    opt = {"model_family": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
    found = {name: {**llama, **dict(zip(gated, shape, strict=True))} for name, shape in LLAMA.items()}
    found.update({name: {**gpt2, **dict(zip(sizes, shape, strict=True))} for name, shape in GPT2.items()})
    found.update({name: {**opt, **dict(zip(sizes, shape, strict=True))} for name, shape in OPT.items()})
    for name, (*shape, vocabulary) in PYTHIA.items():
        found[name] = {"model_family": "neox", "vocab_size": vocabulary, **dict(zip(sizes, shape, strict=True))}
    return found


PRESETS = _presets()


def apply_preset(
    config: ModelConfig,
    tokenizer_vocabulary: int | None,
    length: int | None = None,
    families: Sequence[str] = FAMILIES,
) -> ModelConfig:
    """Fill what flags left open from the preset, the tokenizer and the family.

    ``families`` are those that may be trained, of which the first is the default; ``length`` is the longest
    sequence. Raises ConfigError if sizes are missing, or if flags contradict the preset or the family.
    """
    filled = replace(config)
    if filled.vocab_size is None:
        filled.vocab_size = tokenizer_vocabulary
    if config.preset is not None:
        _fill(filled, config.preset, families)
    filled = completed(filled, families, length)
    filled.check()
    norm_class(architecture(filled).norm, filled.norm_impl)
    if tokenizer_vocabulary is not None and tokenizer_vocabulary > (filled.vocab_size or 0):
        raise ConfigError(
            "the tokenizer is larger than --vocab-size", f"{tokenizer_vocabulary} tokens", f"<= {filled.vocab_size}"
        )
    return filled


def _fill(config: ModelConfig, name: str, families: Sequence[str]) -> None:
    """Set what is open in ``config`` to the values of a preset."""
    allowed = [known for known, fields in PRESETS.items() if fields["model_family"] in families]
    if name not in PRESETS:
        raise unknown_name("--preset is unknown", name, allowed)
    fields = PRESETS[name]
    family = fields["model_family"]
    if name not in allowed:
        raise ConfigError(
            f"--preset {name} is of a family that this program does not train", family, ", ".join(allowed)
        )
    if config.model_family not in (None, family):
        raise ConfigError(f"--model-family contradicts --preset {name}", config.model_family, family)
    for field, value in fields.items():
        if getattr(config, field) is None:
            setattr(config, field, value)
