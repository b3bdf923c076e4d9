"""Signals at any moment, on any rank: all ranks stop at the same update, saved, and the run goes on unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.corpus import TinyCorpus
from tests.engine.stop_cases import MOMENTS
from tests.front_door_cases import ITERS, METHOD, MODEL, TRAIN, records
from tests.harness import run_ranks

BOTH = {"0": ["SIGUSR1"], "1": ["SIGTERM"]}
SECOND = {"1": ["SIGUSR1"]}
# moment, call of it in which signals arrive, signals by rank, update after which the run stops (None: any, or none)
CASES: list[tuple[str, int, dict[str, list[str]], int | None]] = [
    ("opening the data", 0, SECOND, 0),
    ("building", 0, {"0": ["SIGTERM"]}, 0),
    ("loading", 0, BOTH, 0),
    ("update", 0, SECOND, 2),
    ("update", 4, {"0": ["SIGTERM", "SIGTERM", "SIGUSR1"]}, 6),
    ("update", ITERS - 1, SECOND, ITERS),
    ("evaluation", 0, {"1": ["SIGTERM"]}, 4),
    ("evaluation", 2, BOTH, ITERS),
    ("switch", 3, {"1": ["SIGINT"]}, 4),
    ("switch", 4, {"0": ["SIGUSR1"]}, 6),
    ("writing a checkpoint", 0, SECOND, None),
    ("naming a checkpoint", 0, {"0": ["SIGTERM"]}, None),
    ("after the end", 0, {"0": ["SIGUSR1"], "1": ["SIGUSR1"]}, None),
]


def argv(corpus: TinyCorpus) -> list[str]:
    words = f"{MODEL} {METHOD} {TRAIN} --micro-batch-size 2 --ds-config ds_configs/zero1.json"
    return [*words.split(), *corpus.flags()]


@pytest.fixture(scope="module")
def reports(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks say of every case; the last is a run without signals, the one before it runs out of time."""
    root = tmp_path_factory.mktemp("stop")
    chosen = [*CASES, ("update", 0, {}, None), ("update", 0, {}, None)]
    cases = [
        {"moment": moment, "at": at, "signals": sent, "folder": str(root / str(number)), "argv": argv(tiny_corpus)}
        for number, (moment, at, sent, _) in enumerate(chosen)
    ]
    cases[-2].update(late=True, argv=[*cases[-2]["argv"], "--exit-duration-in-mins", "60"])
    for case in cases:
        if "checkpoint" in case["moment"]:
            case["argv"] = [*case["argv"], "--save-interval", "3"]
    ranks = run_ranks("tests.engine.stop_cases:stop", 2, cases, root, timeout=400)
    return [{"case": case, "ranks": list(said)} for case, said in zip(cases, zip(*ranks, strict=True), strict=True)]


def curve(folder: str) -> list[dict[str, Any]]:
    """The log lines without what depends on the machine."""
    machine = ("time", "second", "memory", "flops", "mfu")
    lines = [line for line in records(Path(folder)) if line.keys() & {"loss", "eval_loss"}]
    return [{k: v for k, v in line.items() if not any(word in k for word in machine)} for line in lines]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}, call {CASES[n][1]}")
def test_all_ranks_stop_at_the_same_update_with_everything_saved(reports: list[dict[str, Any]], number: int) -> None:
    expected = CASES[number][3]
    for said in reports[number]["ranks"]:
        if expected is None:
            continue
        assert f"after update {expected};" in said["said"]
        assert said["checkpoints"][-1:] == ([f"step_{expected:08d}"] if expected else [])
    assert reports[number]["ranks"][0]["said"] == reports[number]["ranks"][1]["said"]
    assert reports[number]["ranks"][0]["again"] == reports[number]["ranks"][1]["again"] == ""


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}, call {CASES[n][1]}")
def test_the_curve_is_that_of_an_undisturbed_run(reports: list[dict[str, Any]], number: int) -> None:
    undisturbed = reports[-1]
    assert [said["said"] for said in undisturbed["ranks"]] == ["", ""]
    assert len(curve(undisturbed["case"]["folder"])) == ITERS + 2
    assert curve(reports[number]["case"]["folder"]) == curve(undisturbed["case"]["folder"])


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(reports: list[dict[str, Any]]) -> None:
    for report in reports[:-2]:
        if "checkpoint" in report["case"]["moment"]:
            for said in report["ranks"]:
                assert "saved in" in said["said"] and "step_00000003" in said["checkpoints"]


def test_a_signal_after_the_end_is_too_late(reports: list[dict[str, Any]]) -> None:
    late = [report for report in reports if report["case"]["moment"] == "after the end"]
    assert [said["said"] for said in late[0]["ranks"]] == ["", ""]


def test_a_run_that_is_out_of_time_stops_as_after_a_signal(reports: list[dict[str, Any]]) -> None:
    assert all("--exit-duration-in-mins after update 0;" in said["said"] for said in reports[-2]["ranks"])
    assert curve(reports[-2]["case"]["folder"]) == curve(reports[-1]["case"]["folder"])


def test_every_moment_has_a_case() -> None:
    assert {moment for moment, *_ in CASES} == MOMENTS.keys()
