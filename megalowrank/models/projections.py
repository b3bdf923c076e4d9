"""The fused projections of a block, as shapes alone: read by the modules and by the arithmetic, imports no engine."""

from __future__ import annotations

from megalowrank.config import ModelConfig
from megalowrank.models.architecture import architecture

Blocks = tuple[tuple[str, int], ...]


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


def input_width(config: ModelConfig, projection: str) -> int:
    """Columns of W of a projection."""
    return (config.ffn_hidden_size if projection == "mlp.down" else config.hidden_size) or 0
