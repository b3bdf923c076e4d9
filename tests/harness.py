"""Run a test function on several gloo ranks, each a process of its own, and never hang.

``run_ranks("tests.engine.cases:function", world, payload, tmp_path)`` starts ``world`` processes that
call ``function(payload) -> JSON value`` after joining a file-store process group, and returns the list
of their results. A rank that fails or a launch that exceeds ``timeout`` seconds fails the test with the
tail of every rank's output.

Ranks are forked from one process that has loaded the libraries and done nothing else: loading them anew would take
longer than most tests. ``run_program`` starts a script of ours in such processes, on one rank or as a launcher would on
several; what launchers themselves do is tested with the launchers.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from megalowrank.parallel.launch import free_port

ROOT = Path(__file__).resolve().parents[1]


def warm_context() -> ForkServerContext:
    """Processes that begin with the libraries loaded, for one thread and no accelerator."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def run_ranks(target: str, world: int, payload: Any, tmp_path: Path, timeout: float = 240) -> list[Any]:
    """Results of ``target`` on every rank, by rank."""
    folder = tmp_path / f"ranks_{target.rsplit(':', 1)[-1]}_{world}_{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    (folder / "payload.json").write_text(json.dumps(payload))
    context = warm_context()
    processes = [context.Process(target=_rank, args=(target, str(folder), rank, world)) for rank in range(world)]
    for process in processes:
        process.start()
    _wait(processes, folder, timeout)
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world)]


def run_program(words: Sequence[str], ranks: int = 1, timeout: float = 240) -> str:
    """What a script prints that ends well: ``words`` are its path in the repository and its arguments."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), str(free_port())
        context = warm_context()
        processes = [
            context.Process(target=_script, args=(list(words), name, rank, ranks, port)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        _wait(processes, folder, timeout)
        return "".join((folder / f"log_{rank}.txt").read_text() for rank in range(ranks))


def _script(words: list[str], folder: str, rank: int, ranks: int, port: str) -> None:
    """Run a script as ``python SCRIPT ...`` would."""
    _redirect(f"{folder}/log_{rank}.txt")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(key, None)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(ROOT)
    sys.argv, sys.path[0] = words, str((ROOT / words[0]).parent)
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _redirect(path: str) -> None:
    """Everything that is printed goes to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _wait(processes: list[ForkServerProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        while any(p.exitcode is None for p in processes):
            failed = any(p.exitcode not in (None, 0) for p in processes)
            if failed or time.monotonic() > deadline:
                time.sleep(1.0)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
    codes = [p.exitcode for p in processes]
    if any(codes):
        tails = "\n".join(
            f"--- rank {rank} (exit {code})\n" + (folder / f"log_{rank}.txt").read_text()[-3000:]
            for rank, code in enumerate(codes)
        )
        raise AssertionError(f"ranks failed or timed out after {timeout} s\n{tails}")


def _rank(target: str, folder: str, rank: int, world: int) -> None:
    """One rank, with its output in a file."""
    _redirect(f"{folder}/log_{rank}.txt")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.chdir(ROOT)
    try:
        _call(target, Path(folder), rank, world)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _call(target: str, folder: Path, rank: int, world: int) -> None:
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
