"""Checkpoints in the background: what is in them, when they are written, and what happens if one cannot be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.config import OutputConfig
from megalowrank.engine import saving
from megalowrank.engine.loop import Position
from megalowrank.engine.saving import Saver
from megalowrank.errors import TrainingError
from megalowrank.parallel.groups import Groups, initialize_single_process
from tests.engine.resume_cases import Process, dense_process, save_now


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    yield initialize_single_process(str(tmp_path_factory.mktemp("store") / "store"))


class Gate:
    """Holds up every write of a checkpoint until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.open, self.reached, self.error = threading.Event(), threading.Event(), error
        self.write = saving.save_checkpoint
        monkeypatch.setattr(saving, "save_checkpoint", self.held)

    def held(self, *args: Any) -> Any:
        self.reached.set()
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        return self.write(*args)


def saver(process: Process, folder: Path, **flags: Any) -> Saver:
    return Saver(process.state, OutputConfig(save=str(folder), **flags), None)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def test_training_goes_on_and_the_checkpoint_is_of_its_step(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = dense_process(groups)
    process.advance(0, 3)
    save_now(process.state, tmp_path / "at once", Position(3, 3))
    gate = Gate(monkeypatch)
    background = saver(process, tmp_path / "later")
    background.save(Position(3, 3))
    assert gate.reached.wait(30)
    process.advance(3, 6)
    assert not (tmp_path / "later").exists() and not background.failed
    gate.open.set()
    background.wait()
    first, second = contents(tmp_path / "at once"), contents(tmp_path / "later")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    states = [Checkpoint.open(tmp_path / name).state for name in ("at once", "later")]
    assert states[0] == states[1]


def test_without_async_save_it_is_written_at_once(groups: Groups, tmp_path: Path) -> None:
    process = dense_process(groups)
    saver(process, tmp_path, async_save=False).save(Position(2, 2))
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def test_one_save_waits_for_the_one_before(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, gate = dense_process(groups), Gate(monkeypatch)
    background = saver(process, tmp_path, keep_last=2, keep_every=2)
    background.save(Position(1, 1))
    threading.Timer(0.3, gate.open.set).start()
    background.save(Position(2, 2))
    assert background.lost >= 0.2
    for step in (3, 4, 5):
        background.save(Position(step, step))
    background.wait()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{n:08d}" for n in (2, 4, 5)]


def test_an_error_in_the_background_is_not_lost(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, gate = dense_process(groups), Gate(monkeypatch, TrainingError("the disk is full"))
    background = saver(process, tmp_path)
    gate.open.set()
    background.save(Position(1, 1))
    background._background._thread.join()  # type: ignore[union-attr]
    assert background.failed
    with pytest.raises(TrainingError, match="the disk is full"):
        background.save(Position(2, 2))
    assert not background.failed and not list(tmp_path.iterdir())
    background.save(Position(3, 3))
    with pytest.raises(TrainingError, match="the disk is full"):
        background.wait()


def test_save_seconds_counts_from_the_last_save(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    process = dense_process(groups)
    clock, never = saver(process, tmp_path, save_seconds=60), saver(process, tmp_path)
    now[0] += 59
    assert not clock.overdue()
    now[0] += 2
    assert clock.overdue() and not never.overdue()
    clock.save(Position(1, 1))
    assert not clock.overdue()
    now[0] += 61
    assert clock.overdue()
    clock.wait()


def test_a_folder_has_one_writer(groups: Groups, tmp_path: Path) -> None:
    process = dense_process(groups)
    first, second = saver(process, tmp_path), saver(process, tmp_path)
    with first.alone(), pytest.raises(TrainingError, match="another run is writing into --save"), second.alone():
        pass
    with second.alone():
        second.save(Position(1, 1))
        second.wait()
    assert (tmp_path / "latest").exists()


def test_nothing_of_a_run_depends_on_a_global_random_state(groups: Groups) -> None:
    """A checkpoint holds no generator: every draw is keyed by seed and step, and none is taken from torch's own."""
    process = dense_process(groups)
    before = torch.get_rng_state()
    process.advance(0, 6)
    assert torch.equal(torch.get_rng_state(), before)
