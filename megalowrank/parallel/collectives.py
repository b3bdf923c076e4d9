"""The few collectives of our own, each a no-op in a group of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.errors import ConfigError


def group_size(group: Any) -> int:
    """Ranks in ``group``; None means a single process."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Any) -> int:
    """This rank's number in ``group``; 0 in a single process."""
    return 0 if group is None else group.rank()


def sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum ``tensor`` in place over ``group`` and return it. Every rank of the group calls it.

    With one owner per element and zeros elsewhere the result is exact, whatever the dtype.
    """
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def max_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The largest of every element of ``tensor`` over ``group``, in place. Every rank of the group calls it."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def mean_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Average ``tensor`` in place over ``group`` and return it. Every rank of the group calls it."""
    return sum_over(tensor, group).div_(group_size(group))


def all_true(ok: bool, group: Any) -> bool:
    """Whether every rank of ``group`` passes True; every rank calls it and gets the same answer."""
    if group_size(group) == 1:
        return ok
    flag = torch.tensor([int(ok)], dtype=torch.int32, device=device_of(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def device_of(group: Any) -> torch.device:
    """Where tensors for collectives of ``group`` live."""
    backend = dist.get_backend(group) if isinstance(group, dist.ProcessGroup) else group.name()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def from_first_rank(compute: Callable[[], str], group: Any, rank: int) -> str:
    """Text that rank 0 computes, on every rank; an error of rank 0 is a ConfigError on all others.

    For work that one rank should do alone, such as hashing files. Every rank of ``group`` calls it.
    """
    answer, failure = "", None
    if rank == 0:
        try:
            answer = "+" + compute()
        except Exception as error:
            answer, failure = "-" + str(error), error
    if group_size(group) > 1:
        answer = _broadcast(answer, group, rank)
    if failure is not None:
        raise failure
    if answer.startswith("-"):
        raise ConfigError(answer[1:])
    return answer[1:]


def gather_texts(text: str, group: Any) -> list[str]:
    """The texts of all ranks of ``group``, by rank. Every rank calls it."""
    if group_size(group) == 1:
        return [text]
    own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device_of(group))
    sizes = torch.zeros(group_size(group), dtype=torch.int64, device=own.device)
    sizes[group_rank(group)] = own.numel()
    dist.all_reduce(sizes, group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=own.device)
    padded[: own.numel()] = own
    found = [torch.empty_like(padded) for _ in range(group_size(group))]
    dist.all_gather(found, padded, group=group)
    return [bytes(t[:size].cpu().tolist()).decode() for t, size in zip(found, sizes.tolist(), strict=True)]


def _broadcast(text: str, group: Any, rank: int) -> str:
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device_of(group))
    size = torch.tensor([data.numel() if rank == 0 else 0], dtype=torch.int64, device=data.device)
    dist.all_reduce(size, group=group)
    if rank != 0:
        data = torch.zeros(int(size.item()), dtype=torch.uint8, device=data.device)
    dist.broadcast(data, group_src=0, group=group)
    return bytes(data.cpu().tolist()).decode()
