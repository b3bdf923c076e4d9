"""The fused projections of a block, as shapes alone: read by the modules and by the arithmetic, imports no engine."""

from __future__ import annotations

from collections.abc import Sequence

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.methods.base import Adapters
from megalowrank.models.architecture import architecture

Blocks = tuple[tuple[str, int], ...]
SHORTCUTS = ("residual_1", "residual_2", "cross_in", "cross_cut")


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


def shortcut_names(config: ModelConfig) -> list[str]:
    """All that a model can have, in order; the first block has no block before it to cut across.

    Raises ConfigError for families whose blocks have attention and MLP side by side.
    """
    if architecture(config).parallel_residual:
        raise ConfigError(
            "shortcuts need blocks with attention before the MLP",
            f"--model-family {config.model_family}",
            "llama, gpt2",
        )
    return [
        f"layers.{number}.shortcut.{kind}"
        for number in range(config.num_layers or 0) for kind in SHORTCUTS if number or kind != "cross_cut"
    ]  # fmt: skip


def check_table(config: ModelConfig, adapters: Adapters, names: Sequence[str], adapted: Sequence[str]) -> None:
    """Raise ConfigError for entries of --lora-config about none of the ``names`` or shortcuts, or without effect."""
    shortcuts = shortcut_names(config) if adapters.shortcuts else ()
    adapters.check_names([*names, *shortcuts], [*adapted, *shortcuts])


def shortcut_specs(config: ModelConfig, adapters: Adapters | None) -> dict[str, LowRankSpec]:
    """Those that a method wants, by name."""
    if adapters is None or not adapters.shortcuts:
        return {}
    found = {name: adapters.spec_of(name) for name in shortcut_names(config)}
    return {name: spec for name, spec in found.items() if spec is not None}
