"""Runs of the real program, and one process that makes many runs which must be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalowrank.engine.setup import pretrain
from megalowrank.errors import ConfigError
from megalowrank.models.build import build_llama
from tests.harness import ROOT

BIN = Path(sys.executable).parent
PROGRAM = "pretrain_llama.py"
MODEL = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2"
METHOD = "--method switchlora --lora-rank 8 --switch-interval 4 --switch-freeze-steps 2 --switch-descent-rate 1"
LENGTH, TOTAL, ITERS = 32, 4, 8
TRAIN = (
    f"--seq-length {LENGTH} --global-batch-size {TOTAL} --train-iters {ITERS} --lr 1e-2 --lr-warmup-iters 2 "
    "--log-interval 1 --eval-interval 4 --eval-iters 2"
)


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has: nothing of a launcher, one thread, no accelerator."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC", "GROUP_", "ROLE_", "CROSS_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    path = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    return {**env, **settings, **more}


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    """Start a command in the repository."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(**more), stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process that takes too long is killed and fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"took longer than {timeout} s\n{out[-2000:]}\n{err[-2000:]}") from None
    return process.returncode, out, err


def succeed(command: list[str]) -> str:
    """The output of a command that must end well."""
    code, out, err = finish(start(command))
    assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return out


def plain(*flags: str) -> list[str]:
    return [sys.executable, PROGRAM, *flags]


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, read without the project."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if "loss" in record]


def refusals(payload: list[list[str]]) -> list[str]:
    """What each command line is refused with, one after the other in this process; empty if it is not."""
    found = []
    for argv in payload:
        try:
            pretrain(argv, build_llama, PROGRAM)
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found
