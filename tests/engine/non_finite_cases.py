"""Ranks that train with the real loop while one of them meets NaN or infinity in some attempts.

A case has ``bad`` (attempts), ``fault`` (what goes wrong there), ``budget`` (--max-skipped-steps) and what the
equality cases have. The fault happens on the last rank only, in its first micro-batch.
"""

from __future__ import annotations

import gc
import hashlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from megalowrank.config import OutputConfig, TrainConfig
from megalowrank.data.ahead import BatchesAhead
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine, StepResult
from megalowrank.engine.loop import Loop
from megalowrank.engine.metrics import MetricsWriter, Progress
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.errors import TrainingError
from megalowrank.methods.base import Context, Method
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import Groups
from megalowrank.parallel.requests import Requests
from tests.engine.equality_cases import (
    LR,
    STEPS,
    GroupedDenseEngine,
    Run,
    Tensors,
    batch,
    build,
    context,
    difference,
    groups_of,
    make_engine,
    snapshot,
    start_ranks,
)


class Fault:
    """Poison of one attempt on this rank; ``armed`` says whether it is that attempt."""

    def __init__(self, kind: str, model: BuiltModel) -> None:
        self.kind, self.armed = kind, False
        model.module.register_forward_hook(self._loss)
        model.module.norm.weight.register_hook(self._gradient)

    def _loss(self, module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor | None:
        """Adding leaves the gradient finite: it is the loss alone that says so."""
        term = {"nan loss": torch.nan, "inf loss": torch.inf}.get(self.kind)
        if not self.armed or term is None:
            return None
        self.armed = False
        return loss + term

    def _gradient(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if not self.armed or self.kind != "inf gradient":
            return None
        self.armed = False
        spoiled = gradient.clone()
        spoiled[-1] = torch.inf
        return spoiled


class Samples:
    """Batches by attempt, as the sampler deals them."""

    def __init__(self, micro: int) -> None:
        self.global_batch_size = 4 * micro

    def micro_batch(self, attempt: int, index: int, size: int, rank: int, world: int) -> torch.Tensor:
        return batch(attempt, index).chunk(world)[rank]


class Recorder:
    """Stands between loop and engine: arms the fault and compares the state around every bad attempt."""

    def __init__(self, case: dict[str, Any], model: BuiltModel, method: Method, engine: Engine, faulty: bool) -> None:
        self.case, self.model, self.method, self.engine = case, model, method, engine
        self.fault = Fault(case["fault"], model) if faulty else SimpleNamespace(armed=False)
        self.state, self.group, self.device = engine.state, engine.group, engine.device
        self.applied: list[bool] = []
        self.losses: list[float] = []
        self.changed: list[dict[str, float]] = []

    def train_step(self, micro_batches: Any, lr: float) -> StepResult:
        bad = len(self.applied) in self.case["bad"]
        self.fault.armed = bad
        before = self._state() if bad else None
        result = self.engine.train_step(micro_batches, lr)
        self.applied.append(result.applied)
        if result.applied:
            self.losses.append(float(result.loss))
        if before is not None:
            self.changed.append({k: d["max"] for k, d in difference(self._state(), before).items() if d["max"]})
        return result

    def _state(self) -> Run:
        found = snapshot(self.model, self.engine, self.method)
        found["updates"] = torch.tensor([partition.updates for partition in self.state.partitions])
        return Run([], found)


class Announced:
    """Notes the index of every ``before_step``."""

    def __init__(self, method: Method) -> None:
        self.steps: list[int] = []
        original = method.before_step

        def before_step(step: int, ctx: Context) -> None:
            self.steps.append(step)
            original(step, ctx)

        method.before_step = before_step  # type: ignore[method-assign]


def make_loop(case: dict[str, Any], recorder: Recorder, method: Method, ctx: Context) -> Loop:
    micro = case.get("micro", 1)
    train = TrainConfig(
        lr=LR, seq_length=9, train_iters=STEPS, lr_decay_style="constant", max_skipped_steps=case["budget"]
    )
    return Loop(
        engine=recorder,  # type: ignore[arg-type]
        method=method,
        ctx=ctx,
        train=train,
        output=OutputConfig(),
        lr=LR,
        micro_batch_size=4 // ctx.data_size,
        accumulation=micro,
        batches=BatchesAhead(Samples(micro), 4 // ctx.data_size, micro, ctx.data_rank, ctx.data_size),
        evaluation=SimpleNamespace(due=lambda step: False, begin=lambda: 0),  # type: ignore[arg-type]
        metrics=MetricsWriter(None, False),
        progress=Progress(STEPS, 0, False),
        instruments=SimpleNamespace(update=lambda step: nullcontext(), counters=dict),  # type: ignore[arg-type]
        memory=lambda: 0,
        saver=SimpleNamespace(wait=lambda: None),  # type: ignore[arg-type]
        requests=Requests(None, {}),
        beat=lambda where: None,
        check=SimpleNamespace(due=lambda step: False),  # type: ignore[arg-type]
        ranks=ctx.data_size,
        flops_per_token=0.0,
        peak_flops=None,
    )


def sharded(case: dict[str, Any], groups: Groups) -> tuple[Run, dict[str, Any]]:
    """The run with its faults. Collective."""
    method, model = build(case["method"], case.get("bf16", False), case.get("flags", {}))
    faulty = groups.data_rank == groups.data_size - 1
    engine = make_engine(case, model, groups)
    recorder = Recorder(case, model, method, engine, faulty)
    announced = Announced(method)
    ctx = context(model, engine, groups.data_rank, groups.data_size)
    method.start(ctx)
    loop, error = make_loop(case, recorder, method, ctx), ""
    try:
        loop.run()
    except TrainingError as caught:
        error = str(caught)
    tensors = snapshot(model, engine, method)
    engine.close()
    gc.collect()
    return Run(recorder.losses, tensors), {
        "applied": recorder.applied,
        "changed": recorder.changed,
        "announced": announced.steps,
        "position": [loop.position.step, loop.position.attempts, loop.position.skipped],
        "error": error,
        "digest": digest(tensors),
    }


def digest(tensors: Tensors) -> str:
    """One hash of everything that this rank sees."""
    whole = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors) if name != "gathered")
    return hashlib.sha256(whole).hexdigest()


def dense(case: dict[str, Any], world: int, steps: int) -> Run:
    """One process that never sees the bad attempts' batches."""
    low, order = case.get("bf16", False), groups_of(case, world)
    method, model = build(case["method"], low, case.get("flags", {}))
    if low:
        model.module.bfloat16()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine: DenseEngine = GroupedDenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    ctx = context(model, engine, 0, 1)
    method.start(ctx)
    good = [attempt for attempt in range(STEPS + len(case["bad"])) if attempt not in case["bad"]]
    losses = []

    def shares(attempt: int) -> Any:
        return [[(rank, batch(attempt, m).chunk(world)[rank]) for m, rank in group] for group in order]

    for step, attempt in enumerate(good[:steps]):
        ctx.micro_batches = shares(attempt)
        method.before_step(step, ctx)
        losses.append(float(engine.train_step(ctx.micro_batches, LR).loss))
    if steps < STEPS:
        ctx.micro_batches = shares(good[steps])
        method.before_step(steps, ctx)
    return Run(losses, snapshot(model, engine, method))


def survive(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What happened in every case, and how far its end is from the run without the bad batches."""
    groups, report = start_ranks(), []
    for case in cases:
        found, happened = sharded(case, groups)
        expected = dense(case, groups.data_size, happened["position"][0])
        off = {kind: d["max"] for kind, d in difference(found, expected).items() if d["max"] != 0.0}
        report.append({**happened, "off": off})
    return report
