"""The reference's SwitchLoRA trace through the production code, at every ZeRO stage."""

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


def replay(trace: Path, *flags: str) -> tuple[int, str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/replay_trace.py", str(trace), *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.strip().rsplit("\n", 1)[-1], done.stderr


@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_reference_trace(zero: int, ranks: int) -> None:
    code, last, errors = replay(TRACE, "--zero", str(zero), "--ranks", str(ranks))
    assert code == 0, errors[-2000:]
    found = json.loads(last)
    assert max(found["max_rel"].values()) <= 1e-5
    assert all(found["exact"].values())


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
