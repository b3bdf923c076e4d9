"""Checkpoint folders after a crash at every write, and after kill -9."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megalowrank.checkpoint.io import Checkpoint, find_auto
from megalowrank.errors import TrainingError
from tests.checkpoint.io_cases import folders, save_step, value_of
from tests.harness import warm_context


class Crash(BaseException):
    """The process is gone: nothing catches this, so nothing is cleaned up."""


class Saboteur:
    """Counts every call that changes the disk and fails at a chosen one, before or after its effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, late: bool, error: BaseException) -> None:
        self.calls, self.at, self.late, self.error = 0, at, late, error
        targets: list[tuple[Any, str]] = [
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (safetensors.torch, "save_file"),
        ]
        targets += [(Path, name) for name in ("write_text", "unlink", "mkdir", "chmod")]
        targets += [(shutil, "rmtree")]
        for owner, name in targets:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: Any, **kwargs: Any) -> object:
            self.calls += 1
            if self.calls == self.at and self.late:
                call(*args, **kwargs)
            if self.calls == self.at:
                raise self.error
            return call(*args, **kwargs)

        return counted


def every_failure(scenario: Callable[[Path], object], tmp_path: Path, error: BaseException) -> Iterator[Path]:
    """A root with steps 1 and 2 for each disk call of the scenario, after the scenario failed there."""
    at = 0
    while True:
        at += 1
        for late in (False, True):
            root = tmp_path / f"{at}{late}"
            save_step(root, 1)
            save_step(root, 2)
            with pytest.MonkeyPatch.context() as monkeypatch:
                saboteur = Saboteur(monkeypatch, at, late, error)
                try:
                    scenario(root)
                except (Crash, TrainingError):
                    assert saboteur.calls >= at
            if saboteur.calls < at:
                assert at > 12
                return
            yield root


def save_new(root: Path) -> None:
    save_step(root, 3, keep_last=2)


def save_same(root: Path) -> None:
    save_step(root, 2, fill=22)


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")], ids=["crash", "full"])
@pytest.mark.parametrize(("scenario", "new"), [(save_new, 3), (save_same, 22)])
def test_a_failure_at_any_write_leaves_a_checkpoint(
    tmp_path: Path, scenario: Callable[[Path], object], new: int, error: BaseException
) -> None:
    values = []
    for root in every_failure(scenario, tmp_path, error):
        name = (root / "latest").read_text().strip()
        value = value_of(Checkpoint.open(root))
        values.append(value)
        assert value in (2, new)
        assert name == ("step_00000003" if value == 3 else "step_00000002")
        assert value_of(Checkpoint.open(root / name)) == value
        found, refused = find_auto(root)
        assert (found, refused) == (root / name, ())
        for folder in root.glob("step_*"):
            value_of(Checkpoint.open(folder))
        save_step(root, 4)
        assert value_of(Checkpoint.open(root)) == 4
        assert not [name for name in folders(root) if name.startswith(".")]
        assert value_of(Checkpoint.open(root / "step_00000002")) in (2, 22)
    assert values[0] == 2 and values[-1] == new


def test_fsync_comes_before_each_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(owner: Any, name: str, label: Callable[..., str]) -> None:
        call = getattr(owner, name)

        def noted(*args: Any) -> object:
            events.append(label(*args))
            return call(*args)

        monkeypatch.setattr(owner, name, noted)

    note(os, "fsync", lambda handle: "sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    note(os, "rename", lambda source, target: f"rename {Path(target).name}")
    note(os, "replace", lambda source, target: f"rename {Path(target).name}")
    save_step(tmp_path, 1)
    named, latest = events.index("rename step_00000001"), events.index("rename latest")
    synced = {"rank_00000.safetensors", "manifest.json", "manifest.sha256", ".step_00000001.tmp"}
    assert {f"sync {name}" for name in synced} <= set(events[:named])
    assert f"sync {tmp_path.name}" in events[named:latest]
    assert "sync .latest.tmp" in events[named:latest]
    assert f"sync {tmp_path.name}" in events[latest:]


def save_until_killed(root: Path, first: int, line: Connection) -> None:
    """Run in a process of its own: save, sometimes the same step twice, and tell what is done."""
    torch.set_num_threads(1)
    line.send(0)
    for count in range(first, first + 10_000):
        save_step(root, count // 2, keep_last=2, fill=count)
        line.send(count)


def test_kill_nine_at_random_moments(tmp_path: Path) -> None:
    context = warm_context()
    rng = random.Random(9)
    done = 0
    for _ in range(15):
        near, far = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(tmp_path, done + 1, far))
        process.start()
        far.close()
        near.recv()  # it has started
        done = near.recv()  # saved once, however slow the machine is
        time.sleep(rng.uniform(0.005, 0.08))
        process.kill()
        process.join()
        try:
            while True:
                done = max(done, near.recv())
        except EOFError:
            near.close()
        if done:
            value = value_of(Checkpoint.open(tmp_path))
            assert value in (done, done + 1)
            found, refused = find_auto(tmp_path)
            assert found is not None and refused == ()
            assert [value_of(Checkpoint.open(folder)) for folder in tmp_path.glob("step_*")]
            done = value
    assert done >= 15
