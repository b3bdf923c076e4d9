"""The training loop: one for every method, engine and model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megalowrank.config import OutputConfig, TrainConfig
from megalowrank.data.ahead import BatchesAhead
from megalowrank.engine.engine import Engine, StepResult
from megalowrank.engine.evaluation import Evaluation
from megalowrank.engine.instruments import Instruments
from megalowrank.engine.metrics import Progress, Sink
from megalowrank.engine.replicas import ReplicaCheck
from megalowrank.engine.schedule import learning_rate
from megalowrank.engine.timing import Stopwatch
from megalowrank.errors import Stopped, TrainingError
from megalowrank.methods.base import Context, Method
from megalowrank.parallel.requests import Requests


@dataclass
class Position:
    """Where a run stands. ``step`` counts committed updates, ``attempts`` also the skipped ones.

    ``evaluated`` is the update after which it was evaluated last.
    """

    step: int = 0
    attempts: int = 0
    evaluated: int = 0

    @property
    def skipped(self) -> int:
        """Updates skipped because loss or gradient was not finite."""
        return self.attempts - self.step


class Checkpoints(Protocol):
    """What writes checkpoints; all ranks call it alike."""

    def save(self, position: Position) -> None:
        """Write one at ``position``, in the background if that is wanted."""

    def wait(self) -> None:
        """Return when all are on disk."""


@dataclass
class Loop:
    """Everything one run needs.

    ``requests`` are what any of the ``ranks`` may ask of all: "stop", "save" and "failed" (a checkpoint could not be
    written); ``beat`` is told what is done next, often enough for a watchdog.
    """

    engine: Engine
    method: Method
    ctx: Context
    train: TrainConfig
    output: OutputConfig
    lr: float
    micro_batch_size: int
    accumulation: int
    batches: BatchesAhead
    evaluation: Evaluation
    metrics: Sink
    progress: Progress
    instruments: Instruments
    memory: Callable[[], int]
    saver: Checkpoints
    requests: Requests
    beat: Callable[[str], None]
    check: ReplicaCheck
    ranks: int
    flops_per_token: float
    peak_flops: float | None
    position: Position = field(default_factory=Position)

    def run(self) -> dict[str, Any]:
        """Train to ``train_iters`` (or ``exit_interval``), evaluate and save; returns the last evaluation.

        Raises Stopped, with everything saved, if a rank was asked to end.
        """
        self._step_clock, self._method_clock = time.perf_counter(), Stopwatch(self.engine.device)
        self._waited = self.batches.waited
        self._logged = Position(self.position.step, self.position.attempts)
        last = self.train.train_iters
        if self.train.exit_interval is not None:
            last = min(last, self.position.step + self.train.exit_interval)
        self._announced, self._saved = -1, self.position.step
        self.ctx.ahead = self._ahead
        self.requests.ask()
        self._obey(self.requests.answer())
        if 0 < self.position.step < last and self._evaluation_due():
            self.evaluate()
            self._obey(self.requests.standing)
        while self.position.step < last:
            step = self.position.step
            self.beat(f"the beginning of update {step + 1}")
            if self._announced != step:
                self.requests.ask()
            with self.instruments.update(step):
                self.ctx.micro_batches = self.batches.take(self.position.attempts)
                self._announce(step)
                result = self._update(step)
            if not result.applied:
                continue
            asked = self.requests.answer()
            self._log(result, self.position.step == last)
            if self.check.due(self.position.step):
                self.check.run(self.position.step)
            if self.position.step < last and self._evaluation_due():
                self.evaluate()
            if self._due(self.output.save_interval) or "save" in asked:
                self._save()
            self._obey(asked | self.requests.standing)
        evaluation = self.evaluate()
        self._obey(self.requests.standing)
        self._save()
        self.saver.wait()
        return evaluation

    def _ahead(self, count: int) -> list[torch.Tensor]:
        return self.batches.peek(self.position.attempts + count)

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this update."""
        self.beat(f"the beginning of saving update {self.position.step}")
        if self.output.save and self._saved < self.position.step:
            self.saver.save(self.position)
            self._saved = self.position.step

    def _obey(self, asked: frozenset[str]) -> None:
        """End the run if a rank asked for it, or could not write a checkpoint; between updates only."""
        if "failed" in asked:
            self.saver.wait()
            raise TrainingError("a checkpoint could not be written by another rank")
        if "stop" not in asked:
            return
        self._save()
        self.saver.wait()
        where = "it is not saved: there is no --save"
        if self.output.save:
            where = f"it is saved in {self.output.save}" if self.position.step else "there is nothing to save yet"
        raise Stopped(f"stopped by a signal or --exit-duration-in-mins after update {self.position.step}; {where}")

    def close(self) -> None:
        """End the reading thread, traces, trackers and the progress bar."""
        self.batches.close()
        self.instruments.close()
        self.metrics.close()
        self.progress.close()

    def _announce(self, step: int) -> None:
        """Let the method act before ``step``, once; an update that was skipped is only tried again."""
        with self._method_clock.measure():
            if self._announced != step:
                self.method.before_step(step, self.ctx)
            else:
                self.method.retry(step, self.ctx)
        self._announced = step
        for event in self.method.events():
            self.metrics.write(event)

    def _evaluation_due(self) -> bool:
        """Whether there is to be one now; a run that was stopped in one makes up for it."""
        return self.evaluation.due(self.position.step) and self.position.evaluated != self.position.step

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.position.step % interval == 0

    def _update(self, step: int) -> StepResult:
        """One attempt; a skipped one takes its batch with it and counts against the budget."""
        lr = learning_rate(step, self.lr, self.train) * self.method.lr_scale(step)
        result = self.engine.train_step(self.ctx.micro_batches, lr)
        self.method.after_attempt(result.applied, self.ctx)
        self._lr = lr
        self.position.attempts += 1
        if result.applied:
            self.position.step += 1
            self.progress.advance()
            return result
        self.metrics.write({"step": step + 1, "skipped": self.position.skipped, "loss": float(result.loss)})
        if self.position.skipped > self.train.max_skipped_steps:
            raise TrainingError(
                f"{self.position.skipped} updates were skipped because loss or gradient was not finite "
                f"(--max-skipped-steps {self.train.max_skipped_steps}), the last one at step {step}"
            )
        return result

    def _over_heads(self, loss: float) -> float:
        return loss if self.ctx.heads is None else self.ctx.heads.mean(loss, f"the loss after {self.position.step}")

    def _log(self, result: StepResult, final: bool) -> None:
        step = self.position.step
        if step % self.output.log_interval and not final:
            return
        loss, now = self._over_heads(float(result.loss)), time.perf_counter()
        seconds, updates = now - self._step_clock, self.position.attempts - self._logged.attempts
        tokens_each = self.batches.samples.global_batch_size * self.train.seq_length
        rate = updates * tokens_each / seconds
        line = {
            "step": step,
            "loss": loss,
            "lr": self._lr,
            "grad_norm": float(result.grad_norm),
            "tokens": self.position.attempts * tokens_each,
            "tokens_per_second": rate,
            "step_time_ms": 1000.0 * seconds / updates,
            "method_time_ms": 1000.0 * self._method_clock.take() / updates,
            "data_time_ms": 1000.0 * (self.batches.waited - self._waited) / updates,
            "memory_bytes": self.memory(),
            "skipped": self.position.skipped,
            "tflops_per_rank": rate * self.flops_per_token / self.ranks / 1e12,
            **self.method.counters(),
            **self.instruments.counters(),
        }
        if self.peak_flops is not None:
            line["mfu"] = line["tflops_per_rank"] * 1e12 / self.peak_flops
        self.metrics.write(line)
        self.progress.report(loss, rate)
        self._logged = Position(step, self.position.attempts)
        self._step_clock, self._waited = time.perf_counter(), self.batches.waited

    def evaluate(self) -> dict[str, Any]:
        """What the evaluation finds of the run as it is now, which is logged too.

        Empty if there is nothing to evaluate on, and when the run was asked to stop meanwhile.
        """
        batches = self.evaluation.begin()
        if not batches:
            return {}
        started, stopped = time.perf_counter(), False
        self.method.settle(self.ctx)
        for batch in range(batches):
            self.beat(f"the beginning of evaluation batch {batch}")
            self.requests.ask()
            self.evaluation.take(batch)
            stopped = "stop" in self.requests.answer()
            if stopped:
                break
        self.engine.end_evaluation()
        self.method.unsettle(self.ctx)
        if stopped:
            return {}
        self.position.evaluated = self.position.step
        found: dict[str, Any] = {"step": self.position.step, **self.evaluation.result(self._over_heads)}
        self.metrics.write(found)
        self.progress.line(", ".join(f"{key} {value:.4f}" for key, value in found.items() if key != "step"))
        self._step_clock += time.perf_counter() - started
        return found
