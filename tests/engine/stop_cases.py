"""Ranks that get a signal in the middle of something, and runs that go on afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megalowrank import signals
from megalowrank.checkpoint import write
from megalowrank.engine import setup
from megalowrank.engine.zero import ZeroEngine
from megalowrank.errors import Stopped
from megalowrank.methods.switchlora import SwitchLoRA
from megalowrank.models.build import build_llama
from tests.front_door_cases import PROGRAM

# where the signal arrives: the function during which it does
MOMENTS: dict[str, tuple[Any, str]] = {
    "opening the data": (setup, "open_corpus"),
    "building": (setup, "build_model"),
    "loading": (setup.RunState, "load"),
    "update": (ZeroEngine, "train_step"),
    "evaluation": (ZeroEngine, "eval_step"),
    "switch": (SwitchLoRA, "before_step"),
    "writing a checkpoint": (write._Saving, "write_rank"),
    "naming a checkpoint": (write._Saving, "publish"),
    "after the end": (setup.Report, "end"),
}


@contextmanager
def interrupted(case: dict[str, Any]) -> Iterator[None]:
    """Signals arrive on this rank in call ``at`` (from 0) of the function of the case's moment."""
    sent: list[str] = case["signals"].get(str(dist.get_rank()), [])
    owner, name = MOMENTS[case["moment"]]
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        if calls[0] == case.get("at", 0):
            for word in sent:
                os.kill(os.getpid(), getattr(signal, word))
        calls[0] += 1
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, function):
        yield


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One run with its signals, and then the same command again until it is done."""
    argv = [*case["argv"], "--save", case["folder"], "--load", "auto"]
    signals.listen()
    said, after = "", []
    started = setup._STARTED - 3600.0 * (case.get("late", False) and dist.get_rank() == 0)
    with mock.patch.object(dist, "destroy_process_group"):
        with interrupted(case), mock.patch.object(setup, "_STARTED", started):
            said = attempt(argv)
        after = sorted(path.name for path in Path(case["folder"]).glob("step_*"))
        signals.listen()
        again = attempt(argv) if said else ""
    return {"said": said, "checkpoints": after, "again": again}


def attempt(argv: list[str]) -> str:
    """Why the run stopped; empty if it ended."""
    try:
        setup.pretrain(argv, build_llama, PROGRAM)
    except Stopped as stopped:
        return str(stopped)
    return ""


def stop(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cases, one after the other, in ranks that stay."""
    return [run(case) for case in cases]
