"""The reference's SwitchLoRA trace through the production code, at every ZeRO stage and over tensor-parallel ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / "tests" / "golden" / "data" / "switchlora_trace.npz"
# the dimension of each entry that is as long as W has columns, and rows
BY_COLUMNS = {"Worig": 1, "W0": 1, "W": 1, "A0": 1, "A": 1, "poolA0": 1, "gA": 2, "mA": 1, "vA": 1}
BY_ROWS = {"Worig": 0, "W0": 0, "W": 0, "B0": 0, "B": 0, "poolB0": 1, "gB": 1, "mB": 0, "vB": 0}


def replay(trace: Path, *flags: str) -> tuple[int, str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/replay_trace.py", str(trace), *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.strip().rsplit("\n", 1)[-1], done.stderr


def check(trace: Path, *flags: str) -> None:
    code, last, errors = replay(trace, *flags)
    assert code == 0, last + errors[-2000:]
    found = json.loads(last)
    assert max(found["max_rel"].values()) <= 1e-5
    assert all(found["exact"].values())


def widened(data: dict[str, np.ndarray], dims: dict[str, int], more: int, suffix: int) -> dict[str, np.ndarray]:
    """Matrix 0 of a trace as matrix ``suffix``, with its first ``more`` columns (or rows) once more behind the last.

    A trace clips nothing, so that every element of a vector runs by itself and the copies run like the originals;
    while the smaller side stays the same, so does the number of candidates.
    """
    found = {}
    for key, value in data.items():
        name, *rest = key.split("_")
        if rest and rest[0] == "0":
            dim = dims.get(name)
            again = [value] if dim is None else [value, value.take(range(more), dim)]
            found["_".join((name, str(suffix), *rest[1:]))] = np.concatenate(again, dim or 0)
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of a matrix [48, 51] and one [49, 48]."""
    data = dict(np.load(TRACE))
    both = {**widened(data, BY_COLUMNS, 3, 0), **widened(data, BY_ROWS, 1, 1)}
    assert both["W0_0"].shape == (48, 51) and both["W0_1"].shape == (49, 48)
    for key in ("draws", "k"):
        both[key] = np.repeat(data[key], 2, axis=1)
    path = tmp_path_factory.mktemp("traces") / "odd.npz"
    np.savez(path, meta=data["meta"], **both)
    return path


MORE = pytest.mark.every_cell


@pytest.mark.parametrize(
    ("zero", "ranks"),
    [pytest.param(0, 1, marks=MORE), pytest.param(1, 2, marks=MORE), (2, 1), pytest.param(3, 2, marks=MORE)],
)
def test_reference_trace(zero: int, ranks: int) -> None:
    check(TRACE, "--zero", str(zero), "--ranks", str(ranks))


@pytest.mark.parametrize(("zero", "ranks", "schedule"), [pytest.param(3, 1, "ride", marks=MORE), (1, 2, "partial")])
def test_sizes_that_do_not_divide_are_padded(zero: int, ranks: int, schedule: str, odd: Path) -> None:
    check(odd, "--zero", str(zero), "--ranks", str(ranks), "--tp", "2", "--lowrank-schedule", schedule)


def test_a_wrong_draw_is_noticed(tmp_path: Path) -> None:
    data = dict(np.load(TRACE))
    data["draws"] = 1.0 - data["draws"]
    np.savez(tmp_path / "wrong.npz", **data)
    code, last, _ = replay(tmp_path / "wrong.npz")
    assert code == 1
    assert not json.loads(last)["exact"]["k"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.npz").write_bytes(b"not a zip file")
    code, _, errors = replay(tmp_path / "foreign.npz")
    assert code == 2
    assert "foreign.npz" in errors and "Traceback" not in errors


def test_a_schedule_needs_tensor_parallel_ranks() -> None:
    code, _, errors = replay(TRACE, "--lowrank-schedule", "partial")
    assert code == 2
    assert "--lowrank-schedule partial has no effect with --tp 1" in errors and "Traceback" not in errors
