"""Published model shapes, as a table of numbers.

Source: configurations of ReLoRA, GaLore and SwitchLoRA (vocabulary 32100, RMSNorm 1e-6, untied head).
"""

from __future__ import annotations

from dataclasses import replace

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError, unknown_name

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


def apply_preset(config: ModelConfig, tokenizer_vocabulary: int | None) -> ModelConfig:
    """Fill what flags left open from the preset and the tokenizer; raises ConfigError if not enough."""
    filled = replace(config)
    if config.preset is not None:
        if config.preset not in LLAMA:
            raise unknown_name("--preset is unknown", config.preset, LLAMA)
        names = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads")
        for name, value in zip(names, LLAMA[config.preset], strict=True):
            if getattr(config, name) is None:
                setattr(filled, name, value)
    if filled.num_query_groups is None:
        filled.num_query_groups = filled.num_attention_heads
    if filled.vocab_size is None:
        filled.vocab_size = tokenizer_vocabulary or (VOCABULARY if config.preset else None)
    filled.check()
    if tokenizer_vocabulary is not None and tokenizer_vocabulary > (filled.vocab_size or 0):
        raise ConfigError(
            "the tokenizer is larger than --vocab-size", f"{tokenizer_vocabulary} tokens", f"<= {filled.vocab_size}"
        )
    return filled
