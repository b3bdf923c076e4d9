"""Profiler, count of collectives and dry run through the real program; what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megalowrank.config import DiagnosticsConfig
from megalowrank.engine.instruments import Instruments
from megalowrank.errors import ConfigError
from tests.corpus import TinyCorpus
from tests.engine.layout_cases import alone
from tests.front_door_cases import ITERS, METHOD, MODEL, PROGRAM, TRAIN, training
from tests.harness import run_program

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def observed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two ranks at ZeRO-2 with every instrument that works without a GPU."""
    folder = tmp_path_factory.mktemp("observed") / "run"
    words = f"--ds-config ds_configs/zero2.json {MODEL} {METHOD} {TRAIN}".split()
    watch = ["--comms-summary", "--profile-steps", "2:4", "--profile-ranks", "1", "--output-dir", str(folder)]
    return folder, run_program([PROGRAM, *words, *tiny_corpus.flags(), *watch], 2)


def test_bytes_of_collectives(observed: tuple[Path, str]) -> None:
    """ZeRO-2 gathers every trained parameter once an update, and reduces as many gradients."""
    folder, printed = observed
    run = json.loads((folder / "run.json").read_text())
    hidden, ffn, layers, vocabulary = 32, 48, 2, run["model"]["vocab_size"]
    linears = [(32, hidden), (16, hidden), (16, hidden), (hidden, hidden), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    trained = 2 * vocabulary * hidden + (2 * layers + 1) * hidden + layers * sum(8 * (m + n) for m, n in linears)
    lines = training(folder)
    assert len(lines) == ITERS
    for line in lines:
        assert line["comm_bytes/data/all-gather"] == pytest.approx(4 * trained, rel=0.01)
        assert 4 * trained <= line["comm_bytes/data/all-reduce"] < 4.2 * trained + 40_000
    assert "collectives of an update" in printed and "data: all-gather" in printed


def test_only_the_chosen_rank_records_the_chosen_updates(observed: tuple[Path, str]) -> None:
    folder = observed[0] / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["operators_rank1.txt", "trace_rank1.json"]
    events = json.loads((folder / "trace_rank1.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")}
    assert "aten::addmm" in (folder / "operators_rank1.txt").read_text()
    assert len(steps) in (0, 2)


def test_a_dry_run_writes_nothing(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    words = f"--ds-config ds_configs/zero1.json {MODEL} {METHOD} {TRAIN} --dry-run --save {tmp_path}/run".split()
    printed = run_program([PROGRAM, *words, *tiny_corpus.flags()])
    assert "trainable" in printed and "masters" in printed and "nothing was trained" in printed
    assert "update 1/" not in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"profile_steps": "3"}, "FIRST:LAST"), ({"profile_steps": "4:4"}, "--profile-steps is malformed"),
     ({"profile_steps": "-1:4"}, "--profile-steps is malformed"), ({"profile_ranks": ["x"]}, "--profile-ranks"),
     ({"memory_snapshot": True}, "--memory-snapshot needs --profile-steps")],
)  # fmt: skip
def test_malformed_values(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DiagnosticsConfig(**flags).check()


def test_what_cannot_be_recorded_here(tmp_path: Path) -> None:
    groups = alone()
    snapshot = DiagnosticsConfig(profile_steps="1:2", memory_snapshot=True)
    with pytest.raises(ConfigError, match="an NVIDIA GPU; got device cpu"):
        Instruments(snapshot, tmp_path, groups, CPU)
    with pytest.raises(ConfigError, match="--profile-ranks names a rank that is not there; got 1; allowed: < 1"):
        Instruments(DiagnosticsConfig(profile_steps="1:2", profile_ranks=["0", "1"]), tmp_path, groups, CPU)
    with pytest.raises(ConfigError, match="need --output-dir"):
        Instruments(DiagnosticsConfig(profile_steps="1:2"), None, groups, CPU)
