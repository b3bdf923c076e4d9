"""What tells one family of decoders from another: a table, and the defaults that follow from it.

Sources: Touvron et al. 2023 (LLaMA), Radford et al. 2019 (GPT-2), Black et al. 2022 and Biderman et al. 2023
(GPT-NeoX, Pythia), Zhang et al. 2022 (OPT with norms before the sublayers). Deviation: every family starts from
N(0, --init-method-std), biases at 0. GPT-2 divides the std of its residual projections by √(2·layers), Pythia draws
with √(2/5h) and 2/(layers·√h); neither is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError, unknown_name
from megalowrank.parallel.partition import share


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh form of GPT-2; F.gelu alone is the exact one."""
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Architecture:
    """One family of decoders.

    ``norm`` is RMSNorm or LayerNorm (with bias); ``gated`` has a second projection beside the activation;
    ``biases`` holds for all linears but the head; ``rotary_percent`` is the default share of a head that is
    rotated, None for learned positions; ``tied_output`` is the default of that; ``grouped_query`` allows fewer
    key/value heads than query heads.
    """

    norm: str
    norm_epsilon: float
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    biases: bool
    rotary_percent: float | None
    parallel_residual: bool
    tied_output: bool
    grouped_query: bool


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        norm="RMSNorm", norm_epsilon=1e-6, activation=F.silu, gated=True, biases=False, rotary_percent=1.0,
        parallel_residual=False, tied_output=False, grouped_query=True,
    ),
    "gpt2": Architecture(
        norm="LayerNorm", norm_epsilon=1e-5, activation=gelu_tanh, gated=False, biases=True, rotary_percent=None,
        parallel_residual=False, tied_output=True, grouped_query=False,
    ),
    "neox": Architecture(
        norm="LayerNorm", norm_epsilon=1e-5, activation=F.gelu, gated=False, biases=True, rotary_percent=0.25,
        parallel_residual=True, tied_output=False, grouped_query=False,
    ),
    "opt": Architecture(
        norm="LayerNorm", norm_epsilon=1e-5, activation=F.relu, gated=False, biases=True, rotary_percent=None,
        parallel_residual=False, tied_output=True, grouped_query=False,
    ),
}  # fmt: skip
LLAMA_FAMILIES = ("llama",)
GPT_FAMILIES = ("gpt2", "neox", "opt")
FAMILIES = tuple(ARCHITECTURES)
ROTARY_BASE = 10000.0


def architecture(config: ModelConfig) -> Architecture:
    """The table's entry for ``config``, the first family where none is named, with what ``config`` changes in it."""
    found = ARCHITECTURES[config.model_family or FAMILIES[0]]
    if config.num_labels is not None:
        return replace(found, tied_output=False)
    return found if config.tie_word_embeddings is None else replace(found, tied_output=config.tie_word_embeddings)


def completed(config: ModelConfig, families: Sequence[str], length: int | None = None) -> ModelConfig:
    """A copy with the family and every default that depends on it; the first of ``families`` if none is named.

    ``length`` is the longest sequence in tokens. Raises ConfigError for another family and for values that the
    family has no use for. What it returns, it accepts.
    """
    filled = replace(config, model_family=config.model_family or families[0])
    if filled.model_family not in FAMILIES:
        raise unknown_name("--model-family is unknown", str(filled.model_family), FAMILIES)
    if filled.model_family not in families:
        raise ConfigError("--model-family is not one of this program", filled.model_family, " or ".join(families))
    shape = architecture(filled)
    _refuse_unused(filled, shape)
    if filled.num_query_groups is None:
        filled.num_query_groups = filled.num_attention_heads
    if filled.ffn_hidden_size is None and filled.hidden_size is not None and not shape.gated:
        filled.ffn_hidden_size = 4 * filled.hidden_size
    filled.tie_word_embeddings = shape.tied_output
    if filled.norm_epsilon is None:
        filled.norm_epsilon = shape.norm_epsilon
    if shape.rotary_percent is None:
        _complete_positions(filled, length)
    else:
        filled.rotary_percent = shape.rotary_percent if filled.rotary_percent is None else filled.rotary_percent
        filled.rotary_base = ROTARY_BASE if filled.rotary_base is None else filled.rotary_base
    return filled


def _refuse_unused(config: ModelConfig, shape: Architecture) -> None:
    """Raise ConfigError for a value that has no meaning in this family."""
    rotary, groups = shape.rotary_percent is not None, config.num_query_groups
    refused = {
        "num_query_groups": not shape.grouped_query and groups not in (None, config.num_attention_heads),
        "rotary_percent": not rotary and config.rotary_percent is not None,
        "rotary_base": not rotary and config.rotary_base is not None,
        "max_position_embeddings": rotary and config.max_position_embeddings is not None,
    }
    for name, wrong in refused.items():
        if wrong:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no meaning in a model of the family {config.model_family}",
                getattr(config, name),
                "without it",
            )


def _complete_positions(config: ModelConfig, length: int | None) -> None:
    """The table of learned positions holds every position of a sequence."""
    if config.max_position_embeddings is None:
        config.max_position_embeddings = length
    elif length is not None and config.max_position_embeddings < length:
        raise ConfigError(
            "--max-position-embeddings is shorter than --seq-length", config.max_position_embeddings, f">= {length}"
        )


def check_tensor_parallel(config: ModelConfig, ranks: int) -> None:
    """Raise ConfigError unless ``ranks`` tensor-parallel ranks can share the model.

    Heads are never cut and key/value heads never copied; other widths may leave the last ranks less, but not nothing.
    """
    heads, groups = config.num_attention_heads or 1, config.num_query_groups or 1
    for flag, count in (("num-attention-heads", heads), ("num-query-groups", groups)):
        if count % ranks:
            raise ConfigError(
                f"--{flag} must be a multiple of --tensor-model-parallel-size: heads are not copied to several ranks",
                f"{count} and {ranks}",
            )
    for flag, width in (("ffn-hidden-size", config.ffn_hidden_size or 1), ("vocab-size", config.vocab_size or 1)):
        if share(width, ranks - 1, ranks).real < 1:
            raise ConfigError(
                f"--{flag} leaves the last of --tensor-model-parallel-size ranks nothing", f"{width} and {ranks}"
            )
