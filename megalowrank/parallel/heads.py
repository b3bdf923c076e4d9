"""Heads: groups of ranks that train apart and meet now and then; ranks of the job count heads slowest.

torch.distributed's own world is the inside of one head, so that nothing in it has to know of the others. What crosses
heads goes over groups made by hand on the same store, of which nothing of torch.distributed knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megalowrank.errors import ConfigError, TrainingError

_TIMEOUT = timedelta(minutes=30)


@dataclass
class Heads:
    """The heads of a job, seen from a rank of head ``head`` of ``count``.

    ``link`` joins the ranks at the same place of every head, in the order of heads, where tensors of training live;
    ``host`` the same ranks on the host, ``job`` all ranks of the job. Every rank makes the same calls in the same
    order, counted by committed updates; ``received`` is how many bytes this rank has received over ``link``.
    """

    head: int
    count: int
    link: Any
    host: Any
    job: Any
    job_rank: int
    job_size: int
    store: Any
    timeout: timedelta
    received: int = 0
    _arrivals: int = 0
    _groups: int = 0

    @property
    def place(self) -> int:
        """This rank's number inside its head."""
        return self.job_rank % (self.job_size // self.count)

    def new_host_group(self) -> Any:
        """A gloo group of all ranks of the job that nothing else uses. Every rank calls it."""
        self._groups += 1
        return _gloo(self.store, f"job{self._groups}", self.job_rank, self.job_size, self.timeout)

    def gather(self, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        """``tensor`` of every head, by head; ``what`` says for an error what it is done for.

        Raises TrainingError, with the heads that did not come, where it fails or takes longer than a collective may.
        """
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        self.wait(self.arrive(lambda: self.link.allgather([found], [tensor.contiguous()])), what)
        self.received += (self.count - 1) * tensor.numel() * tensor.element_size()
        return found

    def mean_in_order(self, flat: torch.Tensor, what: str) -> torch.Tensor:
        """The mean over heads of a 1-D tensor, added up in the order of heads: the same bits on every head.

        Twice the bytes of ``flat`` cross, whatever the number of heads. Errors as of ``gather``.
        """
        chunk = -(-flat.numel() // self.count)
        padded = flat.new_zeros(self.count * chunk)
        padded[: flat.numel()] = flat
        parts = torch.empty_like(padded)
        self.wait(self.arrive(lambda: self.link.alltoall_base(parts, padded, [], [])), what)
        self.received += (self.count - 1) * chunk * flat.element_size()
        total = torch.zeros_like(parts[:chunk])
        for part in parts.split(chunk):
            total += part
        return torch.cat(self.gather(total.div_(self.count), what))[: flat.numel()]

    def numbers(self, value: float, what: str) -> list[float]:
        """A number of every head, by head, on the host. Errors as of ``gather``."""
        own = torch.tensor([value], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        self.wait(self.arrive(lambda: self.host.allgather([found], [own])), what)
        return torch.cat(found).tolist()

    def mean(self, value: float, what: str) -> float:
        """The mean of a number over heads; the same on every head."""
        return sum(self.numbers(value, what)) / self.count

    def arrive(self, begin: Callable[[], Any]) -> Any:
        """Begin a collective that crosses heads, and leave word in the store that this rank came to it."""
        self._arrivals += 1
        self.store.set(f"arrived/{self.job_rank}", str(self._arrivals))
        return begin()

    def wait(self, work: Any, what: str) -> None:
        """Return when a collective across heads is done; TrainingError that names the heads that did not come."""
        try:
            work.wait()
        except RuntimeError as error:
            absent = self._absent()
            who = f"head {' and '.join(map(str, absent))} did not come" if absent else "another head failed in it"
            raise TrainingError(f"heads cannot meet for {what}: {who} ({_short(error)})") from error

    def _absent(self) -> list[int]:
        """The heads of which a rank has not arrived where this one is; empty where nobody can tell any more."""
        inside = self.job_size // self.count
        try:
            keys = [f"arrived/{rank}" for rank in range(self.job_size)]
            came = [int(self.store.get(key)) if self.store.check([key]) else 0 for key in keys]
        except RuntimeError:
            return []
        return [h for h in range(self.count) if min(came[h * inside : (h + 1) * inside]) < self._arrivals]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def check_heads(count: int, world: int) -> None:
    """ConfigError unless ``count`` heads divide ``world`` ranks."""
    if world % count:
        raise ConfigError("--lte-heads must divide the number of ranks", f"{count} and {world} rank(s)")


def join_heads(count: int, backend: str, timeout: timedelta | None = None, store: Any = None) -> Heads:
    """Begin torch.distributed inside this rank's head and join the other heads; ``count`` is above 1.

    Every rank of the job calls it instead of ``init_process_group``, after the launcher variables are set. ``backend``
    is that of training; ``store`` is where ranks meet (default: what the launcher set). Raises ConfigError if the
    number of ranks does not divide. Afterwards WORLD_SIZE is that of a head, and RANK still that of the job.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_heads(count, world)
    timeout = timeout or _TIMEOUT
    if store is None:
        store, rank, world = next(rendezvous("env://", rank, world, timeout=timeout))
    store.set_timeout(timeout)
    inside = world // count
    head, place = divmod(rank, inside)
    own = dist.PrefixStore(f"head{head}", store)
    dist.init_process_group(backend, store=own, rank=place, world_size=inside, timeout=timeout)
    os.environ["WORLD_SIZE"] = str(inside)  # what DeepSpeed compares the world that it sees with
    host = _gloo(store, f"host/{place}", head, count, timeout)
    link = _nccl(store, f"link/{place}", head, count, timeout) if backend == "nccl" else host
    job = _gloo(store, "job", rank, world, timeout)
    return Heads(head, count, link, host, job, rank, world, dist.PrefixStore("heads", store), timeout)


def _gloo(store: Any, name: str, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, timeout)


def _nccl(store: Any, name: str, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options)
