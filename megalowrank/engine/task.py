"""A labelled task as data of a run: read, encoded, and the length of the run in epochs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megalowrank.cli import RunConfig
from megalowrank.config import DataConfig, ModelConfig, TrainConfig
from megalowrank.data.labelled import LabelledData, load_labelled
from megalowrank.data.labelled_batches import LabelledBatches, encode_examples
from megalowrank.data.tokenizers import load_tokenizer
from megalowrank.engine.dsconfig import Resolved
from megalowrank.errors import ConfigError
from megalowrank.flags.task import check_task
from megalowrank.methods.base import Method


@dataclass(frozen=True)
class Task:
    """Validation sets by name, the main one first, and the names of classes in order (None: a regression).

    ``examples`` is how many there are to train on.
    """

    name: str
    labels: tuple[str, ...] | None
    examples: int
    validation: dict[str, LabelledBatches]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line about sizes and classes."""
        held_out = ", ".join(f"{len(rows):,} in {name}" for name, rows in self.validation.items())
        kind = "a regression" if self.labels is None else f"{len(self.labels)} classes"
        return f"task {self.name}: {kind}, {self.examples:,} examples to train on, {held_out}"


def load_task(config: RunConfig) -> LabelledData | None:
    """The labelled data of the run, None where text is learned; every rank calls it.

    Raises ConfigError for flags that the task has no use for or lacks, and as ``load_labelled``.
    """
    check_task(config.model, config.train, config.data, config.given)
    return None if config.data.labelled_data is None else load_labelled(config.data.labelled_data)


def with_outputs(config: ModelConfig, data: LabelledData | None) -> ModelConfig:
    """``config`` with the outputs that the task needs; ConfigError if it says something else."""
    if data is None:
        return config
    outputs = 1 if data.labels is None else len(data.labels)
    if config.num_labels not in (None, outputs):
        raise ConfigError(f"--num-labels is not that of {data.name}", config.num_labels, outputs)
    return replace(config, num_labels=outputs)


def with_epochs(resolved: Resolved, data: LabelledData | None, given: set[str]) -> Resolved:
    """``resolved`` with as many updates as ``--epochs`` takes, the last of them filled up from the next epoch.

    ``given`` are the fields that the user set; ConfigError where ``--train-iters`` says something else.
    """
    train = resolved.train
    if data is None or train.epochs is None:
        return resolved
    updates = -(-train.epochs * len(data.train) // resolved.global_batch_size)
    if "train_iters" in given and train.train_iters != updates:
        got = f"{train.epochs} epochs, which are {updates} updates, and {train.train_iters}"
        raise ConfigError("--epochs and --train-iters contradict each other", got, "one of the two")
    train = replace(train, train_iters=updates)
    train.check_warmup()
    return replace(resolved, train=train)


def check_trained(method: Method, data: LabelledData | None) -> None:
    """Raise ConfigError for a method that would leave the head of a task as it was drawn."""
    adapters = method.adapters()
    if data is not None and adapters is not None and adapters.frozen:
        raise ConfigError(
            "the head of a task has to be trained", f"--method {method.name} with frozen parameters",
            "--lte-plain averaged or synchronous, or another method",
        )  # fmt: skip


def open_task(
    data: LabelledData, config: DataConfig, train: TrainConfig, vocabulary: int, batch: int
) -> tuple[LabelledBatches, Task]:
    """The stream to train on, and what is evaluated; every rank calls it.

    Raises ConfigError for a tokenizer with ids beyond the ``vocabulary`` of the model.
    """
    tokenizer, notes = load_tokenizer(config.tokenizer_model or ""), list(data.notes)
    found = {}
    for name, examples in {"train": data.train, **data.validation}.items():
        encoded, cut = encode_examples(tokenizer, examples, train.seq_length)
        if cut:
            notes.append(f"{cut:,} of {len(examples):,} examples of {name} are cut to {train.seq_length} tokens")
        found[name] = LabelledBatches(encoded, train.seed, batch, shuffle=name == "train")
    largest = max(int(rows.encoded[:, :-2].max()) for rows in found.values())
    if largest >= vocabulary:
        raise ConfigError("--tokenizer-model does not fit --vocab-size", f"token {largest}", f"< {vocabulary}")
    rows = found.pop("train")
    return rows, Task(data.name, data.labels, len(rows), found, tuple(notes))


def targets_of(rows: LabelledBatches) -> np.ndarray:
    """The labels [n] of all examples as integers, see ``data.labelled_batches``."""
    return rows.encoded[:, -1]
