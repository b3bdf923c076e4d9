"""Runs that begin under one layout and go on under another: ``layout`` and ``then`` of a case of layout_cases."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalowrank.checkpoint.shards import RunTensors
from megalowrank.config import OutputConfig, ParallelConfig, TrainConfig
from megalowrank.engine.loop import Position
from megalowrank.engine.resume import RunState
from megalowrank.engine.zero import initialize_distributed
from megalowrank.parallel.groups import initialize_groups
from tests.engine.layout_cases import FAMILIES, LENGTH, MICRO, ROWS, SEED, STEPS, Divided, drop_groups, references
from tests.engine.resume_cases import save_now
from tests.engine.whole_runs import Run, difference, digest, logical, padding

CUT = 6


def state_of(run: Divided, case: dict[str, Any]) -> RunState:
    batch, low = ROWS * MICRO, case.get("bf16", False)
    train = TrainConfig(method=case["method"], seed=SEED, seq_length=LENGTH, global_batch_size=batch, bf16=low)
    flags = asdict(run.method.config)
    described = {"model": FAMILIES[case["family"]], "train": asdict(train), "method_config": flags}
    tensors = RunTensors(run.model, run.engine.state, run.method, run.groups)
    return RunState(run.engine, run.method, tensors, run.groups, described)


def name_of(case: dict[str, Any]) -> str:
    kind = "".join(f", {key}" for key in ("bf16", "flags") if case.get(key))
    return f"{case['method']}, {case['layout']} to {case['then']}, {case['family']}{kind}"


def first_part(case: dict[str, Any], folder: Path) -> None:
    """Train the first updates under the first layout, and save. Collective."""
    run = Divided.start(case)
    losses, norms, _ = run.train(case, 0, CUT)
    state = state_of(run, case)
    save_now(state, folder, Position(CUT, CUT))
    found = {"losses": losses, "norms": norms, "digest": digest(logical(state.tensors, run.groups.world))}
    if dist.get_rank() == 0:
        (folder / "first.json").write_text(json.dumps(found))
    run.engine.close()


def second_part(case: dict[str, Any], folder: Path, expected: Run) -> dict[str, Any]:
    """Load under the second layout, train to the end and compare with one process. Collective."""
    run = Divided.start({**case, "layout": case["then"]})
    state = state_of(run, case)
    position = state.load(OutputConfig(save=str(folder), load="auto"))
    loaded = digest(logical(state.tensors, run.groups.world))
    losses, norms, _ = run.train(case, CUT, STEPS)
    begun = json.loads((folder / "first.json").read_text())
    tensors, counters = logical(state.tensors, run.groups.world), run.method.counters()
    found = Run(begun["losses"] + losses, begun["norms"] + norms, tensors, counters)
    report = {
        "position": [position.step, position.attempts],
        "digests": [begun["digest"], loaded],
        "worst": difference(found, expected),
        "padding": padding(state.tensors),
        "learned": expected.losses[CUT] - expected.losses[-1],
    }
    run.engine.close()
    return report


def go(payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Begin the cases of ``begin``, then finish those of ``finish``. Collective."""
    initialize_distributed(None)
    initialize_groups(ParallelConfig())
    gc.collect()
    gc.freeze()
    root = Path(payload["folder"])
    expected = list(references(payload["finish"], root))
    for case in payload["begin"]:
        first_part(case, root / case["folder"])
        drop_groups()
    found = {}
    for case, whole in zip(payload["finish"], expected, strict=True):
        found[name_of(case)] = second_part(case, root / case["folder"], whole)
        drop_groups()
    return found
