"""Run a test function on several gloo ranks, each a fresh process, and never hang.

``run_ranks("tests.engine.cases:function", world, payload, tmp_path)`` starts ``world`` processes that
call ``function(payload) -> JSON value`` after joining a file-store process group, and returns the list
of their results. A rank that fails or a launch that exceeds ``timeout`` seconds fails the test with the
tail of every rank's output.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(target: str, world: int, payload: Any, tmp_path: Path, timeout: float = 240) -> list[Any]:
    """Results of ``target`` on every rank, by rank."""
    folder = tmp_path / f"ranks_{target.rsplit(':', 1)[-1]}_{world}_{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    (folder / "payload.json").write_text(json.dumps(payload))
    processes = []
    for rank in range(world):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        env.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
        log = (folder / f"log_{rank}.txt").open("w")
        command = [sys.executable, "-m", "tests.harness", target, str(folder)]
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    _wait(processes, folder, timeout)
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world)]


def _wait(processes: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            failed = any(p.poll() not in (None, 0) for p in processes)
            if failed or time.monotonic() > deadline:
                time.sleep(1.0)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    codes = [p.returncode for p in processes]
    if any(codes):
        tails = "\n".join(
            f"--- rank {rank} (exit {code})\n" + (folder / f"log_{rank}.txt").read_text()[-3000:]
            for rank, code in enumerate(codes)
        )
        raise AssertionError(f"ranks failed or timed out after {timeout} s\n{tails}")


def _main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(json.loads((folder / "payload.json").read_text()))
    (folder / f"result_{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
