"""Ranks of several heads that meet, and one that does not come."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import megalowrank.quiet  # noqa: F401
from megalowrank.config import ParallelConfig
from megalowrank.engine.guard import Guard
from megalowrank.errors import run_main
from megalowrank.parallel.collectives import all_true
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.heads import Heads, join_heads
from megalowrank.parallel.requests import Requests, host_group


def joined(payload: dict[str, Any], count: int) -> Heads:
    """Leave the harness's world. Collective."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{payload['folder']}/heads", int(os.environ["WORLD_SIZE"]))
    return join_heads(count, "gloo", timedelta(seconds=60), store)


def meet(payload: dict[str, Any]) -> dict[str, Any]:
    """What a rank of four, in two heads, gets of every collective. Collective."""
    heads = joined(payload, 2)
    groups = initialize_groups(ParallelConfig(), heads)
    own = torch.tensor([1.0, 1e-8, float(heads.job_rank)])
    gathered = heads.gather(own, "a test")
    received = heads.received
    drawn = torch.randn(7, generator=torch.Generator().manual_seed(heads.job_rank))
    requests = Requests(host_group(None, heads), {"stop": lambda: heads.job_rank == 3}, heads=heads)
    requests.ask()
    return {
        "inside": [dist.get_rank(), dist.get_world_size()],
        "job": [groups.rank, groups.world, groups.head],
        "stream": list(groups.stream),
        "gathered": [tensor.tolist() for tensor in gathered],
        "received": received,
        "drawn": drawn.tolist(),
        "mean": heads.mean_in_order(drawn, "a test").tolist(),
        "number": heads.mean(float(heads.job_rank), "a test"),
        "answer": sorted(requests.answer()),
    }


def start(store: str, world: int, rank: int, how: str, error: str) -> None:
    """One rank of two heads in a process of its own, under the guard of a run."""
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives
    run_main(lambda: run(store, world, rank, how))


def run(store: str, world: int, rank: int, how: str) -> None:
    """Two meetings, to the second of which a rank does not come."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    heads = join_heads(2, "gloo", timedelta(seconds=4), dist.FileStore(store, world))
    with Guard(0, None, initialize_groups(ParallelConfig(), heads)):
        heads.gather(torch.zeros(1), "the first merge")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "sleep":
            time.sleep(60)
        heads.gather(torch.zeros(1), "the second merge")
        all_true(True, heads.job)
