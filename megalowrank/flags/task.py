"""``--task``: which flags have a meaning in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from megalowrank.config import DataConfig, ModelConfig, TrainConfig
from megalowrank.errors import ConfigError

CLASSIFICATION = "classification"
_FOREIGN = {
    CLASSIFICATION: ("data_path", "train_data_path", "valid_data_path", "split", "eval_iters"),
    "language-modeling": ("labelled_data", "epochs", "num_labels"),
}


def check_task(model: ModelConfig, train: TrainConfig, data: DataConfig, given: set[str]) -> None:
    """Raise ConfigError for flags that the task has no use for, and for those that a labelled one lacks.

    ``given`` are the fields that were typed or stand in the configuration file.
    """
    for section in (model, train, data):
        for name in _FOREIGN[train.task]:
            if getattr(section, name, None) != _default(section, name):
                raise ConfigError(f"--{name.replace('_', '-')} has no meaning with --task {train.task}")
    if train.task != CLASSIFICATION:
        return
    for name in ("labelled_data", "tokenizer_model"):
        if getattr(data, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing: --task {train.task} needs it")
    if train.epochs is None and "train_iters" not in given:
        raise ConfigError("the length of the run is missing", None, "--epochs or --train-iters")


def _default(section: Any, name: str) -> Any:
    """The default of a field; None where the section has no such field."""
    return next((item.default for item in dataclasses.fields(section) if item.name == name), None)
