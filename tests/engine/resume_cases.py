"""Ranks that train, save, start afresh, load and go on; and the same run without a break."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.shards import RunTensors
from megalowrank.config import OutputConfig, TrainConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine
from megalowrank.engine.loop import Position
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.resume import RunState
from megalowrank.engine.saving import Saver
from megalowrank.errors import ConfigError
from megalowrank.methods import METHODS as REGISTRY
from megalowrank.methods.base import Method
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import Groups
from tests.engine.equality_cases import (
    LR,
    MODEL,
    SEED,
    STEPS,
    Run,
    batch,
    build,
    context,
    difference,
    folded_weights,
    make_engine,
    snapshot,
    start_ranks,
)

SPARSE = {"lora_rank": 4, "lora_target": ["o"], "switch_interval": 12, "switch_freeze_steps": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "fifo": {"method": "switchlora"},
    "sparse": {"method": "switchlora", "flags": SPARSE},
    "random": {"method": "switchlora", "flags": {"switch_order": "random"}},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "merge": {"method": "relora"},
}
KNOWN = {variant["method"] for variant in VARIANTS.values()}
VARIANTS.update({name: {"method": name} for name in REGISTRY if name not in KNOWN})


def run_json(case: dict[str, Any], method: Method, **changed: Any) -> dict[str, Any]:
    """What ``run.json`` says of a run, as far as resuming reads it."""
    train = TrainConfig(
        method=case["method"], seed=SEED, seq_length=9, global_batch_size=4, bf16=case.get("bf16", False)
    )
    return {
        "model": {**MODEL},
        "train": {**dataclasses.asdict(train), **changed},
        "method_config": dataclasses.asdict(method.config),
    }


class Process:
    """What one process of a job holds, from its start to its end."""

    def __init__(self, case: dict[str, Any], model: BuiltModel, method: Method, engine: Engine, groups: Groups) -> None:
        self.model, self.method, self.engine, self.groups = model, method, engine, groups
        self.ctx = context(model, engine, groups.data_rank, groups.data_size)
        method.start(self.ctx)
        tensors = RunTensors(model, engine.state, method, groups)
        self.state = RunState(engine, method, tensors, groups, run_json(case, method))
        self.losses: list[float] = []
        self.switches: list[int] = []

    @classmethod
    def start(cls, case: dict[str, Any], groups: Groups) -> Process:
        """Under DeepSpeed. Collective."""
        method, model = build(case["method"], case.get("bf16", False), case.get("flags", {}))
        return cls(case, model, method, make_engine(case, model, groups), groups)

    def advance(self, first: int, last: int) -> None:
        """Updates first .. last - 1."""
        rank, world = self.groups.data_rank, self.groups.data_size
        for step in range(first, last):
            before = _switched(self.method)
            self.ctx.micro_batches = [batch(step, 0).chunk(world)[rank]]
            self.method.before_step(step, self.ctx)
            self.switches.append(_switched(self.method) - before)
            self.losses.append(float(self.engine.train_step(self.ctx.micro_batches, LR).loss))

    def spoil(self) -> None:
        """NaN in everything that a load has to bring back, so that nothing can survive from the start."""
        for partition in self.engine.state.partitions:
            partition.updates = 99
            for fragment in partition.fragments:
                for flat in (partition.master, partition.exp_avg, partition.exp_avg_sq):
                    flat[fragment.offset : fragment.offset + fragment.numel] = torch.nan
        for folded in folded_weights(self.model):
            folded.locate().flat.fill_(torch.nan)
            if folded.residual is not None:
                folded.residual.fill_(77)
        for fixed in (fixed for layer in self.model.layers for fixed in layer.fixed):
            fixed.locate().flat.fill_(torch.nan)
        for saved in self.method.saved_tensors():
            saved.rows.fill_(torch.nan)
        self.engine.state.clocks.births[1:] = -7

    def end(self) -> None:
        self.engine.close()
        gc.collect()


def dense_process(groups: Groups, variant: str = "fifo", **flags: Any) -> Process:
    """Updates of one process without DeepSpeed."""
    case = VARIANTS[variant]
    method, model = build(case["method"], False, {**case.get("flags", {}), **flags})
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    return Process(case, model, method, engine, groups)


def output(folder: str, **more: Any) -> OutputConfig:
    return OutputConfig(save=folder, **more)


def save_now(state: RunState, folder: str | Path, position: Position) -> None:
    """Write a checkpoint and return when it is on disk. Every rank calls it."""
    Saver(state, OutputConfig(save=str(folder), async_save=False), state.groups.everyone).save(position)


def plain_run(case: dict[str, Any], groups: Groups) -> Run:
    process = Process.start(case, groups)
    process.advance(0, STEPS)
    found = Run(process.losses, snapshot(process.model, process.engine, process.method))
    process.end()
    return found


def broken_run(case: dict[str, Any], groups: Groups) -> tuple[Run, dict[str, list[int]]]:
    """The run with a new process at every cut; ``stages`` of the case, if given, are those of the new processes.

    Also returns how many vectors switched before each update, and how many rows were frozen at each cut.
    """
    losses: list[float] = []
    happened: dict[str, list[int]] = {"switches": [], "frozen": []}
    process, position = Process.start(case, groups), Position()
    for number, cut in enumerate([*case["cuts"], STEPS]):
        process.advance(position.step, cut)
        losses += process.losses
        happened["switches"] += process.switches
        if number == len(case["cuts"]):
            break
        happened["frozen"].append(_frozen(process.model))
        saved = Position(cut, cut + number)
        save_now(process.state, case["folder"], saved)
        process.end()
        stage = case.get("stages", [case["stage"]] * (number + 1))[number]
        process = Process.start({**case, "stage": stage}, groups)
        process.spoil()
        position = process.state.load(output(case["folder"], load=case.get("load", case["folder"])))
        assert position == saved, position
    found = Run(losses, snapshot(process.model, process.engine, process.method))
    process.end()
    return found, happened


def refusals(case: dict[str, Any], groups: Groups) -> str:
    """Save a run and load it into one with ``other`` flags; this rank's error."""
    process = Process.start(case, groups)
    save_now(process.state, case["folder"], Position(1, 1))
    process.end()
    process = Process.start({**case, "flags": {**case["flags"], **case["other"]}}, groups)
    try:
        process.state.load(output(case["folder"], load=case["folder"]))
    except ConfigError as error:
        return str(error)
    finally:
        process.end()
    return "not refused"


def _switched(method: Method) -> int:
    return int(method.switched.sum()) if hasattr(method, "switched") else 0


def _frozen(model: BuiltModel) -> int:
    """Rows of A that get no gradient now."""
    return sum(stop - start for layer in model.layers for start, stop in layer.gate_A.frozen)


def resume(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each broken run is from the one without a break."""
    groups, report = start_ranks(), []
    for case in cases:
        if "other" in case:
            report.append({"error": refusals(case, groups)})
            continue
        found, happened = broken_run(case, groups)
        report.append({"worst": difference(found, plain_run(case, groups)), **happened})
    return report


def save_and_reload(cases: list[dict[str, Any]]) -> list[str]:
    """Train half of the run and save, or ``load`` a checkpoint into a fresh process and save it elsewhere."""
    groups = start_ranks()
    for case in cases:
        process = Process.start(case, groups)
        position = Position(STEPS // 2, STEPS // 2)
        if "load" in case:
            process.spoil()
            position = process.state.load(output(case["folder"], load=case["load"]))
        else:
            process.advance(0, STEPS // 2)
        save_now(process.state, case["folder"], position)
        process.end()
    return [case["folder"] for case in cases]
