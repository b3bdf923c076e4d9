"""Ranks of test_traffic: known collectives, in two groups, several as one and from a backward hook."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from megalowrank.parallel.traffic import Traffic


def count(payload: Any) -> dict[str, list[int]]:
    """What a Traffic saw of one call of each kind."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in range(world)][rank]
    traffic = Traffic({tuple(range(world)): "world", (0, 1): "pair"})
    numbers = torch.ones(10)
    dist.all_reduce(numbers)
    with traffic:
        dist.all_reduce(numbers)
        dist.all_reduce(numbers, group=alone)
        dist.all_gather([torch.empty(10) for _ in range(world)], numbers)
        dist.broadcast(numbers.double(), 0)
        with _coalescing_manager():  # as DeepSpeed gathers the parameters of a module under ZeRO-3
            for gathered in torch.empty(2, 10 * world).unbind():
                dist.all_gather_into_tensor(gathered, numbers)
        if rank < 2:
            dist.all_reduce(torch.ones(3, dtype=torch.bfloat16), group=pair)
        hooked = torch.ones(5, requires_grad=True)
        hooked.register_hook(lambda gradient: dist.all_reduce(gradient.clone()) and None)
        hooked.sum().backward()
    dist.all_reduce(numbers)
    found = {f"{group}: {name}": [v.calls, v.payload] for (group, name), v in traffic.take().items()}
    assert not traffic.take()
    return found
