"""Whole training runs of the reference implementations, replayed through our engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megalowrank.config import TrainConfig
from megalowrank.engine.schedule import learning_rate, with_restarts
from megalowrank.parallel.groups import initialize_single_process
from tests.golden.plain_relora import make_run
from tests.golden.replay import Golden, dense, found_in
from tests.harness import run_ranks

DATA = Path(__file__).parent / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        runs = found_in(Path(metafunc.config.getoption("--golden-dir")))
        assert runs, "no runs in --golden-dir"
        metafunc.parametrize("golden", runs, ids=[run.name for run in runs])


@pytest.fixture
def built(golden: Golden) -> Golden:
    """The run, if its method is built."""
    if not golden.built:
        pytest.skip(f"{golden.name}: the method {golden.family} is not built yet")
    return golden


def test_float64_dense_engine(built: Golden, tmp_path: Path) -> None:
    """Last loss and validation loss within 1e-6 of the reference."""
    initialize_single_process(str(tmp_path / "store"))
    losses, validation = dense(built, torch.float64)
    assert losses[-1] == pytest.approx(built.record["loss"][-1], abs=1e-6)
    assert validation == pytest.approx(built.record["val"], abs=1e-6)


def test_float32_through_deepspeed(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every built run at ZeRO-2 on two ranks in one launch: 1e-5 early on, 1e-3 at the end.

    Some recorded runs are chaotic (gradient norms of 60 between norms of 1): there float32 alone, without
    DeepSpeed, ends further than 1e-3 from the float64 reference. Then the end must be as near as that.
    """
    folder = Path(request.config.getoption("--golden-dir")).absolute()
    runs = [run for run in found_in(folder) if run.built]
    assert runs, "no run of a built method in --golden-dir"
    payload = {"folder": str(folder), "runs": [run.name for run in runs]}
    results = run_ranks("tests.golden.replay:through_deepspeed", 2, payload, tmp_path, timeout=600)[0]
    for run, (losses, validation) in zip(runs, results, strict=True):
        early = np.subtract(losses, run.record["loss"])[:15]
        assert np.abs(early).max() < 1e-5, run.name
        ends = np.abs(np.subtract([losses[-1], validation], [run.record["loss"][-1], run.record["val"]]))
        if ends.max() > 1e-3:
            assert ends.max() < 3 * float32_noise(run, tmp_path), (run.name, ends)


VARIANTS = {
    "magnitude_shared": {"fix_init": True, "share": 0.9, "shared": True},
    "magnitude_independent": {"fix_init": True, "share": 0.8, "shared": False},
    "zero_start": {"fix_init": False, "share": 0.0, "shared": True},
    "zero_start_magnitude": {"fix_init": False, "share": 0.9, "shared": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_relora_variants_that_no_recorded_run_covers(name: str, tmp_path: Path) -> None:
    """Both masks and both starts against plain torch on Hugging Face's model, in float64."""
    make_run(DATA, tmp_path / "runs", f"relora_{name}", steps=48, **VARIANTS[name])
    (run,) = found_in(tmp_path / "runs")
    assert run.family == "relora"
    initialize_single_process(str(tmp_path / "store"))
    losses, validation = dense(run, torch.float64)
    assert np.abs(np.subtract(losses, run.record["loss"])).max() < 1e-7
    assert validation == pytest.approx(run.record["val"], abs=1e-7)


def test_schedule_of_the_recorded_relora_run() -> None:
    """Every learning rate of the reference's jagged cosine."""
    record = json.loads((DATA / "relora_s1_fixinit_zeroreset.json").read_text())
    cfg = record["cfg"]
    train = TrainConfig(
        train_iters=cfg["steps"], lr_decay_style="cosine_restarts", lr_warmup_iters=cfg["warm"],
        lr_restart_warmup_iters=cfg["rwarm"], min_lr=0.1 * cfg["lr"],
    )  # fmt: skip
    train = with_restarts(train, cfg["R"])
    found = [learning_rate(step, cfg["lr"], train) for step in range(cfg["steps"])]
    assert found == pytest.approx(record["lr"], rel=1e-12, abs=1e-18)


def float32_noise(run: Golden, tmp_path: Path) -> float:
    """How far a float32 run without DeepSpeed ends from the reference."""
    initialize_single_process(str(tmp_path / "store"))
    losses, validation = dense(run, torch.float32)
    return max(abs(losses[-1] - run.record["loss"][-1]), abs(validation - run.record["val"]))
