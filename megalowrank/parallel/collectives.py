"""The few collectives of our own, each a no-op in a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def group_size(group: Any) -> int:
    """Ranks in ``group``; None means a single process."""
    return 1 if group is None else dist.get_world_size(group)


def sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum ``tensor`` in place over ``group`` and return it. Every rank of the group calls it.

    With one owner per element and zeros elsewhere the result is exact, whatever the dtype.
    """
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def mean_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Average ``tensor`` in place over ``group`` and return it. Every rank of the group calls it."""
    return sum_over(tensor, group).div_(group_size(group))


def all_true(ok: bool, group: Any) -> bool:
    """Whether every rank of ``group`` passes True; every rank calls it and gets the same answer."""
    if group_size(group) == 1:
        return ok
    flag = torch.tensor([int(ok)], dtype=torch.int32, device=_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def _device(group: Any) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
