"""Who am I: ranks from deepspeed, torchrun, bare srun, or one plain process.

All launchers end in the same environment variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE,
MASTER_ADDR, MASTER_PORT), which is what torch.distributed and DeepSpeed read.
"""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import MutableMapping

from megalowrank.errors import ConfigError


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as ``gpu[03-05,9],login`` -> ``gpu03``."""
    head = re.match(r"(?:[^\[\],]|\[\w+[^\[\]]*\])+(?=,|$)", nodelist.strip())
    if not head:
        raise ConfigError("SLURM_JOB_NODELIST is not a node list", repr(nodelist))
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head.group())


def set_rank_environment(env: MutableMapping[str, str] | None = None) -> tuple[int, int, int]:
    """Fill the launcher variables that are missing and return (rank, world size, local rank).

    Every rank calls it first. Raises ConfigError on a half-set environment.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        env.setdefault("LOCAL_RANK", "0")
        env.setdefault("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        _from_slurm(env)
    elif "RANK" in env or "WORLD_SIZE" in env:
        raise ConfigError(
            "RANK and WORLD_SIZE must both be set", f"RANK={env.get('RANK')} WORLD_SIZE={env.get('WORLD_SIZE')}"
        )
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise ConfigError(f"{name} is not set", None, "the address of rank 0, set by the launcher")
    env.setdefault("OMP_NUM_THREADS", "1")
    _allow_many_files()
    rank, world, local = (_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= world:
        raise ConfigError("RANK is not below WORLD_SIZE", f"RANK={rank} WORLD_SIZE={world}")
    return rank, world, local


def _allow_many_files() -> None:
    """The first rank has several connections to every other one, more than the usual 1024 files in a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _number(env: MutableMapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", env[name]):
        raise ConfigError(f"{name} is not a number", repr(env[name]), "what the launcher sets")
    return int(env[name])


def _from_slurm(env: MutableMapping[str, str]) -> None:
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env["WORLD_SIZE"])
    env["LOCAL_SIZE"] = re.split(r"[(,]", tasks)[0]
    env.setdefault(
        "MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1")))
    )
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
