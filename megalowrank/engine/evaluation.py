"""What an evaluation computes, batch by batch: held-out loss of text, or the measures of a labelled task."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megalowrank.data.labelled_batches import MILLION
from megalowrank.data.metrics import metrics_of
from megalowrank.data.sampler import GlobalBatches
from megalowrank.engine.engine import Engine
from megalowrank.engine.task import Task, targets_of
from megalowrank.models.task_head import TaskHead, task_loss
from megalowrank.parallel.collectives import gather_texts, mean_over
from megalowrank.parallel.groups import Groups

EVAL_INTERVAL = 100


class Evaluation(ABC):
    """One kind of evaluation of a run. Every rank makes the same calls.

    ``shares`` is how a rank takes part in a global batch: micro-batch size, how many of them, its place among
    ``places``.
    """

    def __init__(self, engine: Engine, micro_batch_size: int, accumulation: int, place: tuple[int, int]) -> None:
        self.engine, self.micro_batch_size, self.accumulation, self.place = (
            engine, micro_batch_size, accumulation, place,
        )  # fmt: skip

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether one follows update ``step``, which is not the last."""

    @abstractmethod
    def begin(self) -> int:
        """Forget what was before; how many batches there are, 0 if there is nothing to evaluate on."""

    @abstractmethod
    def take(self, number: int) -> None:
        """Compute one of them."""

    @abstractmethod
    def result(self, over_heads: Callable[[float], float]) -> dict[str, Any]:
        """What was found after the last; ``over_heads`` is the mean of a number over heads that train apart."""

    def micro_batches(self, samples: GlobalBatches, batch: int) -> list[torch.Tensor]:
        """This rank's micro-batches of a global batch."""
        size = self.micro_batch_size
        return [samples.micro_batch(batch, i, size, *self.place) for i in range(self.accumulation)]


class HeldOutLoss(Evaluation):
    """Mean loss in nats per token over ``batches`` global batches, fewer if there are fewer; bits per byte with it."""

    def __init__(
        self, samples: GlobalBatches | None, batches: int, interval: int, bytes_per_token: float | None, *run: Any
    ) -> None:
        super().__init__(*run)
        self.samples, self.interval, self.bytes_per_token = samples, interval, bytes_per_token
        self.batches = 0 if samples is None else min(batches, max(samples.batches_per_epoch, 1))

    def due(self, step: int) -> bool:
        return self.interval > 0 and step % self.interval == 0

    def begin(self) -> int:
        self._total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        return self.batches

    def take(self, number: int) -> None:
        assert self.samples is not None
        self._total += self.engine.eval_step(self.micro_batches(self.samples, number))

    def result(self, over_heads: Callable[[float], float]) -> dict[str, Any]:
        loss = over_heads(float(mean_over(self._total, self.engine.group)) / self.batches)
        if self.bytes_per_token is None:
            return {"eval_loss": loss}
        return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) / self.bytes_per_token}


class TaskMeasures(Evaluation):
    """Loss and measures over whole validation sets, every example once.

    ``head`` is the head of the task on ranks that hold it, else None. Without an ``interval`` in updates every epoch
    is followed by an evaluation: after the update with its last example.
    """

    def __init__(
        self, task: Task, head: torch.nn.Module | None, interval: int | None, batch: int, groups: Groups, *run: Any
    ) -> None:
        super().__init__(*run)
        self.task, self.interval, self.batch, self.groups = task, interval, batch, groups
        self.head = head if isinstance(head, TaskHead) else None
        self._parts = [
            (name, number)
            for name, rows in task.validation.items()
            for number in range(-(-len(rows) // batch))
        ]  # fmt: skip

    def due(self, step: int) -> bool:
        if self.interval is not None:
            return self.interval > 0 and step % self.interval == 0
        return step * self.batch // self.task.examples > (step - 1) * self.batch // self.task.examples

    def begin(self) -> int:
        self._found: list[tuple[str, int, list[float]]] = []
        return len(self._parts)

    def take(self, number: int) -> None:
        name, batch = self._parts[number]
        kept: list[torch.Tensor] = []
        if self.head is not None:
            self.head.kept = kept
        self.engine.eval_step(self.micro_batches(self.task.validation[name], batch))
        if self.head is None:
            return
        self.head.kept = None
        if self.groups.tensor_rank == 0:
            places = (place for i in range(self.accumulation) for place in self._places(batch, i))
            logits = torch.cat(kept).double().tolist()
            self._found += [(name, place, row) for place, row in zip(places, logits, strict=True)]

    def _places(self, batch: int, index: int) -> range:
        """Where the examples of a micro-batch stand in their set."""
        rank, ranks = self.place
        first = batch * self.batch + (index * ranks + rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def result(self, over_heads: Callable[[float], float]) -> dict[str, Any]:
        texts = gather_texts(json.dumps(self._found), self.groups.everyone)
        found: dict[str, dict[int, list[float]]] = {name: {} for name in self.task.validation}
        for name, place, logits in (part for text in texts for part in json.loads(text)):
            found[name][place] = logits
        measures: dict[str, Any] = {}
        for number, (name, rows) in enumerate(self.task.validation.items()):
            logits = np.array([found[name][place] for place in range(len(rows))])
            prefix = "eval" if number == 0 else f"eval_{name}"
            for measure, value in self._measured(logits, targets_of(rows)).items():
                measures[f"{prefix}_{measure}"] = value
        return measures

    def _measured(self, logits_NK: np.ndarray, targets_N: np.ndarray) -> dict[str, float]:
        loss = float(task_loss(torch.from_numpy(logits_NK), torch.from_numpy(targets_N)))
        if self.task.labels is None:
            return {"loss": loss, **metrics_of("regression", logits_NK[:, 0], targets_N / MILLION)}
        return {"loss": loss, **metrics_of("classification", logits_NK.argmax(1), targets_N)}
