"""Ranks that do nothing but end, each in its own way."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import megalowrank.quiet  # noqa: F401
from megalowrank.config import ParallelConfig
from megalowrank.engine.guard import Guard
from megalowrank.errors import ConfigError, run_main
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.lookout import GRACE


def end(how: str) -> None:
    """Do what this rank is meant to end of; the others wait for what never comes."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "raise":
        raise ValueError("the disk of this rank is on fire")
    elif how == "mistake":
        raise ConfigError("--data-path is not there on this host", "/data", "a file")
    elif how == "collective":
        dist.all_reduce(torch.zeros(1))
    elif how in ("sleep", "hang"):
        time.sleep(60)
    elif how == "late":
        time.sleep(GRACE + 2)
    elif how == "strangers":
        strangers()


def strangers() -> None:
    """Connections to every listening port of this machine, without the token: nobody may care."""
    with open("/proc/net/tcp6") as file:
        ports = {int(line.split()[1].rsplit(":", 1)[1], 16) for line in file.readlines()[1:] if line.split()[3] == "0A"}
    assert ports
    for port in ports:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as peer:
                peer.sendall(b'{"token": "wrong", "rank": 1}\n{"failed": 1, "reason": "a lie"}\n[1]\nnot json\n')
        except OSError:
            continue
    time.sleep(1)


def start(store: str, world: int, rank: int, how: str, error: str) -> None:
    """One rank, in a process of its own that has loaded everything."""
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives
    run_main(lambda: join(store, world, rank, how))


def join(store: str, world: int, rank: int, how: str) -> None:
    os.environ.update(RANK=str(rank), MASTER_ADDR="127.0.0.1")
    shared = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    with Guard(2 if how == "hang" else 0, None, initialize_groups(ParallelConfig())):
        end(how)
