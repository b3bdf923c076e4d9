"""Which combinations of parallelism, ZeRO and model a run may have: one table of refusals, each with its reason.

What the table does not refuse is built and tested; ``tools/make_layouts_doc.py`` prints it for users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """What a layout is, as far as a rule asks. ``seq_length`` in tokens; ``zero`` is ``zero_optimization``."""

    tensor: int = 1
    pipe: int = 1
    sequence: bool = False
    stage: int = 0
    bf16: bool = False
    layers: int = 1
    seq_length: int = 1
    overlap_comm: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False


@dataclass(frozen=True)
class Rule:
    """A refusal: ``what`` is refused where ``applies``, because of ``reason``; ``allowed`` is what works."""

    what: str
    applies: Callable[[Facts], bool]
    reason: str
    allowed: str


RULES = (
    Rule(
        "--pipeline-model-parallel-size with ZeRO stage 2 or 3",
        lambda f: f.pipe > 1 and f.stage >= 2,
        "DeepSpeed's pipeline reduces gradients once per update, these stages in every backward pass",
        "ZeRO stage 1",
    ),
    Rule(
        "--pipeline-model-parallel-size with ZeRO stage 0",
        lambda f: f.pipe > 1 and f.stage == 0,
        "DeepSpeed's gradient norm leaves out replicated parameters of all stages but the first",
        "ZeRO stage 1",
    ),
    Rule(
        "--pipeline-model-parallel-size with zero_optimization.overlap_comm",
        lambda f: f.pipe > 1 and f.overlap_comm,
        "DeepSpeed's pipeline would never reduce the gradients",
        "overlap_comm false",
    ),
    Rule(
        "--pipeline-model-parallel-size above --num-layers",
        lambda f: f.pipe > f.layers,
        "every stage computes at least one block",
        "fewer stages",
    ),
    Rule(
        "--tensor-model-parallel-size with ZeRO stage 0 in bf16",
        lambda f: f.tensor > 1 and f.stage == 0 and f.bf16,
        "DeepSpeed's optimizer of that mode takes the norm of this rank's gradients for the norm of all",
        "ZeRO stage 1",
    ),
    Rule(
        "--sequence-parallel with a --seq-length that does not divide",
        lambda f: f.sequence and f.seq_length % f.tensor != 0,
        "every tensor-parallel rank holds equally many positions",
        "a multiple of --tensor-model-parallel-size",
    ),
)


def refusal(facts: Facts) -> Rule | None:
    """The first rule that refuses a layout, if any."""
    return next((rule for rule in RULES if rule.applies(facts)), None)


def check_layout(parallel: ParallelConfig, model: ModelConfig, train: TrainConfig, zero: dict[str, Any]) -> None:
    """Raise ConfigError for a layout that is not supported, with the reason."""

    def offloaded(block: str) -> bool:
        return zero.get(block, {}).get("device", "none") != "none"

    facts = Facts(
        tensor=parallel.tensor_model_parallel_size,
        pipe=parallel.pipeline_model_parallel_size,
        sequence=parallel.sequence_parallel,
        stage=zero["stage"],
        bf16=train.bf16,
        layers=model.num_layers or 1,
        seq_length=train.seq_length,
        overlap_comm=bool(zero.get("overlap_comm", False)),
        offload_optimizer=offloaded("offload_optimizer"),
        offload_param=offloaded("offload_param"),
    )
    rule = refusal(facts)
    if rule is not None:
        raise ConfigError(f"{rule.what} is not supported: {rule.reason}", allowed=rule.allowed)
