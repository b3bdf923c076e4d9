"""TensorBoard read back by its own reader, also after a kill and a resume; wandb by a stand-in; nothing needless."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalowrank.config import OutputConfig
from megalowrank.engine import trackers
from megalowrank.engine.metrics import read_metrics
from megalowrank.engine.trackers import Trackers, open_trackers
from megalowrank.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RUN = {"train": {"lr": 1e-3}, "method": "full"}


def opened(folder: Path | None, output: OutputConfig | None = None, main: bool = True) -> Trackers:
    return open_trackers(folder, output or OutputConfig(), main, RUN)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard shows them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_every_number_of_every_record_is_a_scalar(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found.truncate_from(1)
    found.write({"step": 1, "loss": torch.tensor(2.5), "tokens": 10**9, "lr": math.nan, "skipped": True, "note": "x"})
    found.write({"step": 2, "loss": 2.25, "tokens": 2 * 10**9})
    found.write({"step": 2, "eval_loss": 2.125})
    assert events(tmp_path / "tensorboard") == {
        "loss": [(1, 2.5), (2, 2.25)], "tokens": [(1, 1e9), (2, 2e9)], "skipped": [(1, 1.0)], "eval_loss": [(2, 2.125)],
    }  # fmt: skip
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]
    found.close()


def test_a_resumed_run_shows_every_step_once(tmp_path: Path) -> None:
    """Three processes: killed after step 7 and resumed from 4; killed at once; resumed from 6."""
    program = (
        "import os, sys; from pathlib import Path; from megalowrank.config import OutputConfig\n"
        "from megalowrank.engine.trackers import open_trackers\n"
        "found = open_trackers(Path(sys.argv[1]), OutputConfig(), True, {})\n"
        "first, last, salt = map(int, sys.argv[2:])\n"
        "found.truncate_from(first)\n"
        "for step in range(first, last): found.write({'step': step, 'loss': step + salt})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    for first, last, salt in ((1, 8, 100), (5, 9, 200), (7, 12, 300)):
        words = [sys.executable, "-c", program, str(tmp_path), str(first), str(last), str(salt)]
        assert subprocess.run(words, env=env, timeout=120).returncode == -9
    expected = [(step, step + (100 if step < 5 else 200 if step < 7 else 300)) for step in range(1, 12)]
    assert events(tmp_path / "tensorboard")["loss"] == expected
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == expected


def test_the_folder_of_events_can_be_chosen(tmp_path: Path) -> None:
    output = OutputConfig(tensorboard_dir=str(tmp_path / "events"))
    for folder in (tmp_path / "run", None):
        found = opened(folder, output)
        found.write({"step": 1, "loss": 1.0})
        found.close()
    assert events(tmp_path / "events") == {"loss": [(1, 1.0), (1, 1.0)]}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*/file/x: "):
        opened(None, OutputConfig(tensorboard_dir=str(tmp_path / "file" / "x"))).write({"step": 1})


def test_other_ranks_and_runs_without_a_folder_write_nothing(tmp_path: Path) -> None:
    for found in (opened(tmp_path, main=False), opened(None)):
        found.truncate_from(1)
        found.write({"step": 1, "loss": 1.0})
        found.close()
    opened(tmp_path).truncate_from(1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys; from pathlib import Path; from megalowrank.config import OutputConfig\n"
        "from megalowrank.engine.trackers import open_trackers\n"
        "open_trackers(Path('nowhere'), OutputConfig(), True, {}).truncate_from(1)\n"
        "print([name for name in ('tensorboard', 'wandb', 'matplotlib', 'tensorflow') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


# ---------------------------------------------------------------- wandb


class FakeWandb(ModuleType):
    """Keeps what it is told."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.refuse = ""

    def init(self, **options: Any) -> Any:
        if self.refuse:
            raise self.Error(self.refuse)
        self.started.append(options)
        return SimpleNamespace(log=self.logged.append, finish=self.finish, define_metric=self.define)

    def define(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake, found = FakeWandb(), trackers.importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(
        trackers.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(origin="here") if name == "wandb" else found(name),
    )
    return fake


ASKED = OutputConfig(wandb_project="p", wandb_name="n", wandb_mode="offline")


def test_wandb_gets_configuration_and_numbers(tmp_path: Path, wandb: FakeWandb) -> None:
    folder = tmp_path / "new" / "run"
    found = opened(folder, ASKED)
    assert not wandb.started
    found.truncate_from(1)
    found.write({"step": 1, "loss": torch.tensor(2.5), "lr": math.inf, "word": "x"})
    found.close()
    (options,) = wandb.started
    identity = options.pop("id")
    assert (folder / "wandb_id").read_text() == identity + "\n" and len(identity) == 8
    assert options == {
        "project": "p", "name": "n", "mode": "offline", "dir": str(folder), "resume": "allow", "config": RUN,
    }  # fmt: skip
    assert wandb.logged == [{"step": 1, "loss": 2.5}] and wandb.finished == 1
    assert json.loads((folder / "metrics.jsonl").read_text())["word"] == "x"


def test_wandb_goes_on_in_the_same_run_only_if_resumed(tmp_path: Path, wandb: FakeWandb) -> None:
    for step in (1, 5, 9, 1, 2):
        opened(tmp_path, replace(ASKED, wandb_name=None)).truncate_from(step)
    first, second, third, fresh, last = (options["id"] for options in wandb.started)
    assert first == second == third != fresh == last
    assert {options["name"] for options in wandb.started} == {tmp_path.name}


def test_wandb_that_refuses_is_one_line_before_training(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refuse = "no key"
    with pytest.raises(ConfigError, match="wandb does not start: no key; allowed: wandb login"):
        opened(tmp_path, ASKED).truncate_from(1)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = SimpleNamespace(origin=None)
    for spec in (None, missing):
        monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name, spec=spec: spec)
        for main in (True, False):
            with pytest.raises(ConfigError, match="--wandb-project needs the package wandb, which is not installed"):
                opened(None, ASKED, main)
            with pytest.raises(ConfigError, match="tensorboard, which is not installed"):
                opened(tmp_path, main=main)


def test_flags_of_trackers_are_checked() -> None:
    with pytest.raises(ConfigError, match="--wandb-name needs --wandb-project"):
        OutputConfig(wandb_name="n").check()
