"""A DeepSpeed JSON and the flags, resolved into the configuration that ``ZeroEngine`` takes.

Every key is honoured or refused by name (``dskeys``), and every "auto" becomes a value here: DeepSpeed
itself drops "auto" without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalowrank.config import TrainConfig
from megalowrank.engine.dsbatch import resolve_batch
from megalowrank.engine.dskeys import TOP_LEVEL, ZERO, Value
from megalowrank.engine.dsread import AUTO, check, load, shown
from megalowrank.errors import ConfigError

_NEVER = 10**9
_PASSED_ON = (
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "log_level",
)  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """What a run uses: DeepSpeed's configuration, and the flags with what the JSON says taken over.

    ``accumulation`` is the number of micro-batches of ``micro_batch_size`` samples that one rank runs for
    one update of ``global_batch_size`` samples.
    """

    deepspeed: dict[str, Any]
    micro_batch_size: int
    global_batch_size: int
    accumulation: int
    train: TrainConfig
    stage: int
    pin_host_memory: bool


def resolve(
    path_or_dict: str | Path | dict[str, Any],
    train: TrainConfig,
    given: set[str],
    data_parallel_size: int,
    hidden_size: int,
    heads: int = 1,
) -> Resolved:
    """Resolve a DeepSpeed JSON (a path or its content) against the flags.

    ``given`` names the fields of ``train`` that the user typed: against them the JSON may not speak, while
    it wins over defaults. ``hidden_size`` is what the "auto" buckets are made from. The batch is that of all
    ``data_parallel_size`` ranks, of which DeepSpeed sees those of one of ``heads``.
    """
    asked = check(load(path_or_dict), TOP_LEVEL)
    zero = _resolve_zero(asked.get("zero_optimization", {}), hidden_size)
    _check_reduction(asked, zero)
    batch = resolve_batch(asked, train, data_parallel_size)
    train = replace(_take_over(asked, train, given), micro_batch_size=batch.micro, global_batch_size=batch.total)
    deepspeed: dict[str, Any] = {
        "train_batch_size": batch.total // heads,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.clip_grad,
        "bf16": {"enabled": train.bf16, "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": asked.get("steps_per_print", _NEVER),
        "timers": _timers(asked),
        **{key: asked[key] for key in _PASSED_ON if key in asked},
    }
    if asked.get("comms_logger", {}).get("enabled"):
        deepspeed["comms_logger"] = asked["comms_logger"]
    return Resolved(deepspeed, batch.micro, batch.total, batch.accumulation, train, zero["stage"], _pinned(zero))


def _timers(asked: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's throughput timer, off unless it is asked for: it waits for the device twice per micro-batch."""
    throughput = asked.get("timers", {}).get("throughput", {})
    return {"throughput": {"enabled": False, **throughput}}


def _pinned(zero: dict[str, Any]) -> bool:
    """Whether host buffers are page-locked: as the first offload block that says so, else true."""
    blocks = (zero.get("offload_optimizer", {}), zero.get("offload_param", {}))
    return next((block["pin_memory"] for block in blocks if "pin_memory" in block), True)


def _resolve_zero(asked: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """``zero_optimization`` with every "auto" replaced, checked against its stage."""
    stage = asked.get("stage", 0)
    automatic = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "overlap_comm": stage == 3,
    }
    zero = {key: automatic[key] if value == AUTO else value for key, value in asked.items()}
    for key, value in zero.items():
        _check_stage(f"zero_optimization.{key}", value, ZERO[key], stage)
    _check_offload(zero, stage)
    return {**zero, "stage": stage, "memory_efficient_linear": False}


def _check_stage(key: str, value: Any, spec: Any, stage: int) -> None:
    """Refuse a value on which DeepSpeed does not act under ``stage``."""
    if isinstance(spec, Value) and stage not in spec.stages and value != spec.neutral:
        stages = ", ".join(map(str, spec.stages))
        raise ConfigError(
            f"{key} has no effect under ZeRO stage {stage}", shown(value), f"stage {stages}; or remove it"
        )


def _offloaded(zero: dict[str, Any], block: str) -> bool:
    return zero.get(block, {}).get("device", "none") != "none"


def _check_offload(zero: dict[str, Any], stage: int) -> None:
    """Refuse offloading that DeepSpeed would not do, and keys that offloading overrides or needs."""
    optimizer, param = (_offloaded(zero, block) for block in ("offload_optimizer", "offload_param"))
    if optimizer and stage == 0:
        raise ConfigError("zero_optimization.offload_optimizer.device has no effect under ZeRO stage 0", "cpu", "none")
    if param and stage != 3:
        raise ConfigError(
            f"zero_optimization.offload_param.device has no effect under ZeRO stage {stage}", "cpu", "none"
        )
    if optimizer and stage in (1, 2) and zero.get("contiguous_gradients") is False:
        raise ConfigError("zero_optimization.contiguous_gradients is overridden by offload_optimizer", "false", "true")
    if zero.get("ignore_unused_parameters") is False and not optimizer:
        raise ConfigError("zero_optimization.ignore_unused_parameters has no effect without offload_optimizer", "false")


def _check_reduction(asked: dict[str, Any], zero: dict[str, Any]) -> None:
    """Refuse to scale gradients before their reduction where DeepSpeed would not, or would do it wrong."""
    factor = asked.get("gradient_predivide_factor", 1.0)
    if factor == 0:
        raise ConfigError("gradient_predivide_factor is out of range", factor, "> 0")
    active = ["prescale_gradients"] * asked.get("prescale_gradients", False)
    active += ["gradient_predivide_factor"] * (factor != 1)
    if len(active) == 2:
        raise ConfigError("gradient_predivide_factor has no effect with prescale_gradients", None, "one of them")
    for key in active:
        _check_stage(key, asked[key], TOP_LEVEL[key], zero["stage"])
        if zero["stage"] and zero.get("reduce_scatter", True):
            raise ConfigError(f"{key} needs zero_optimization.reduce_scatter false", shown(asked[key]))


def _take_over(asked: dict[str, Any], train: TrainConfig, given: set[str]) -> TrainConfig:
    """The flags, with the values of the JSON where it has any; both may speak only if they agree."""
    optimizer = asked.get("optimizer", {})
    params = optimizer.get("params", {})
    betas = params.get("betas", AUTO)
    beta1, beta2 = (AUTO, AUTO) if betas == AUTO else betas
    sources = {
        "lr": ("optimizer.params.lr", params.get("lr", AUTO)),
        "adam_beta1": ("optimizer.params.betas", beta1),
        "adam_beta2": ("optimizer.params.betas", beta2),
        "adam_eps": ("optimizer.params.eps", params.get("eps", AUTO)),
        "weight_decay": ("optimizer.params.weight_decay", params.get("weight_decay", AUTO)),
        "clip_grad": ("gradient_clipping", asked.get("gradient_clipping", AUTO)),
        "bf16": ("bf16.enabled", asked.get("bf16", {}).get("enabled", AUTO)),
    }
    for name, (key, value) in sources.items():
        if value != AUTO and name in given and getattr(train, name) != value:
            flag = f"--{name.replace('_', '-')}"
            got = f"{shown(getattr(train, name))} and {shown(value)}"
            raise ConfigError(
                f"{flag} and {key} of the DeepSpeed JSON contradict each other", got, "one of them, or the same value"
            )
    train = replace(train, **{name: value for name, (_, value) in sources.items() if value != AUTO})
    _check_optimizer(optimizer, "optimizer" in asked, train)
    return train


def _check_optimizer(optimizer: dict[str, Any], present: bool, train: TrainConfig) -> None:
    """The learning rate is known and positive, and the type says what will run."""
    if present and "type" not in optimizer:
        raise ConfigError("optimizer.type is missing in the DeepSpeed JSON", None, "AdamW")
    if train.lr is None:
        raise ConfigError("the learning rate is missing", None, "--lr, or optimizer.params.lr of the DeepSpeed JSON")
    if not (train.lr > 0 and math.isfinite(train.lr)):
        raise ConfigError("the learning rate (--lr or optimizer.params.lr) is out of range", train.lr, "> 0")
    if train.min_lr > train.lr:
        raise ConfigError("--min-lr is above the peak learning rate", train.min_lr, f"<= {train.lr}")
    if optimizer.get("type") == "adam" and train.weight_decay:
        raise ConfigError(
            "optimizer.type Adam with weight decay is not supported: decay is decoupled from the gradient",
            f"weight decay {train.weight_decay}", "AdamW",
        )  # fmt: skip
