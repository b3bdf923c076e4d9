"""The README's first command, shortened to a few updates, in this interpreter's environment."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_make_pretrain(tmp_path: Path) -> None:
    """Sample text, tokenizer, two ranks at ZeRO-2 with offload, evaluation, checkpoint, plots."""
    installed = Path(sys.prefix) / ".installed"
    run = tmp_path / "quickstart"
    command = ["make", "pretrain", f"VENV={sys.prefix}", "-o", str(installed), "ITERS=6", "WARMUP=2", f"RUN={run}"]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "unigram model" in done.stdout and "bits per byte" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    for picture in ("loss.png", "schedule.png", "spectrum.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert (run / "tensorboard").is_dir()
    assert "Traceback" not in done.stderr
    the_readme_lets_it_write(run, env)


def the_readme_lets_it_write(run: Path, env: dict[str, str]) -> None:
    """The README's command that samples text, on this run."""
    (line,) = re.findall(r"^python (tools/generate.py .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = [word.replace("runs/quickstart", str(run)) for word in shlex.split(line)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("KING HENRY") and len(done.stdout) > 50
