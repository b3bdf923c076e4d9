"""The three batch numbers: global batch = micro batch x accumulation x data-parallel size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalowrank.config import TrainConfig
from megalowrank.engine.dsread import AUTO
from megalowrank.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Samples per forward pass of a rank, micro-batches per update of a rank, samples per update."""

    micro: int
    accumulation: int
    total: int


@dataclass(frozen=True)
class _Given:
    """A batch number and where it comes from; ``number`` is None if nobody says."""

    name: str
    number: int | None
    source: str


def resolve_batch(asked: dict[str, Any], train: TrainConfig, data_parallel_size: int) -> Batch:
    """Take the batch numbers from flags and JSON, and derive those that are missing.

    As in DeepSpeed, one batch size alone means no accumulation.
    """
    total = _given("global batch", "--global-batch-size", train.global_batch_size, "train_batch_size", asked)
    micro = _given("micro batch", "--micro-batch-size", train.micro_batch_size, "train_micro_batch_size_per_gpu", asked)
    steps = _given("accumulation", "", None, "gradient_accumulation_steps", asked)
    if total.number is None and micro.number is None:
        raise ConfigError(
            "the batch size is missing", None, "--global-batch-size and --micro-batch-size (or one of them), "
            "or train_batch_size and train_micro_batch_size_per_gpu of the DeepSpeed JSON",
        )  # fmt: skip
    if total.number is None:
        accumulation = steps.number or 1
        size = micro.number or 1
        return Batch(size, accumulation, size * accumulation * data_parallel_size)
    size = micro.number or max(1, total.number // ((steps.number or 1) * data_parallel_size))
    accumulation = steps.number or max(1, total.number // (size * data_parallel_size))
    if size * accumulation * data_parallel_size != total.number:
        raise _contradiction((total, micro, steps), data_parallel_size)
    return Batch(size, accumulation, total.number)


def _given(name: str, flag: str, from_flag: int | None, key: str, asked: dict[str, Any]) -> _Given:
    from_json = None if asked.get(key) == AUTO else asked.get(key)
    if from_flag is not None and from_flag < 1:
        raise ConfigError(f"{flag} is out of range", from_flag, ">= 1")
    if from_flag is not None and from_json is not None and from_flag != from_json:
        raise ConfigError(
            f"the {name} of global batch = micro batch x accumulation x data-parallel size is given twice",
            f"{from_flag} by {flag} and {from_json} by {key} of the DeepSpeed JSON",
        )
    sources = [flag] * (from_flag is not None) + [key] * (from_json is not None)
    return _Given(name, from_flag if from_flag is not None else from_json, " and ".join(sources))


def _contradiction(given: tuple[_Given, _Given, _Given], data_parallel_size: int) -> ConfigError:
    """The equation that does not hold, and where each number came from."""
    total, micro, steps = (f"{part.name} {'?' if part.number is None else part.number}" for part in given)
    equation = f"{total} = {micro} x {steps} x data-parallel size {data_parallel_size}"
    unknown = any(part.number is None for part in given)
    sources = ", ".join(f"{part.name} from {part.source}" for part in given if part.source)
    return ConfigError(f"{equation} {'has no whole solution' if unknown else 'does not hold'} ({sources})")
