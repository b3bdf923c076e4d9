"""Bytes that collectives move, seen where torch dispatches them: ours, DeepSpeed's and Megatron-Core's alike.

Nothing is patched. While a ``Traffic`` is active every c10d operator of this process passes through it, those of
backward hooks included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
    "gather_": "gather",
    "scatter_": "scatter",
}


@dataclass
class Volume:
    """Calls of one collective in one group, and the bytes of the whole tensors they worked on."""

    calls: int = 0
    payload: int = 0


class Traffic(TorchDispatchMode):
    """Counts collectives while active, by (group, collective).

    ``labels``: the name of a group by its ranks, ascending. The payload of a call is its larger side: the tensor of
    an all-reduce, the result of an all-gather, the input of a reduce-scatter. Groups of one rank are left out.
    """

    def __init__(self, labels: Mapping[tuple[int, ...], str]) -> None:
        super().__init__()
        self.labels = dict(labels)
        self.volumes: dict[tuple[str, str], Volume] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = _NAMES.get(func._schema.name.removeprefix("c10d::"))
        if name is None:
            return
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        ranks = tuple(sorted(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arguments["process_group"]))))
        if len(ranks) == 1:
            return
        label = self.labels.get(ranks, f"{len(ranks)} ranks")
        volume = self.volumes.setdefault((label, name), Volume())
        volume.calls += 1
        volume.payload += max((_bytes(argument) for argument in args), default=0)

    def take(self) -> dict[tuple[str, str], Volume]:
        """What was counted since the last call."""
        found, self.volumes = self.volumes, {}
        return found


def _bytes(argument: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(argument))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)
