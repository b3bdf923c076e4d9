"""Comparison of what ranks hold alike: one hash per rank, and the name of the tensor where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.engine.engine import Engine
from megalowrank.engine.zero_state import is_sharded
from megalowrank.errors import TrainingError
from megalowrank.lowrank.factors import folded_weights
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.collectives import all_true, device_of, group_size
from megalowrank.parallel.groups import Groups
from megalowrank.parallel.wire import shared_parameters

_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_NONE = torch.zeros((), dtype=torch.int64)
TIED = "embedding.weight"


def hash_of(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of the bits of ``tensor``, as an int64 scalar on its device; one changed bit always changes it."""
    bits = tensor.detach().reshape(-1).view(_VIEWS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].to(torch.int64)
        weights = 2 * torch.arange(begin, begin + part.numel(), device=tensor.device) + 1
        total += (part * weights).sum()
    return total


class ReplicaCheck:
    """Compares replicas every ``interval`` updates (0: never).

    Over tensor-parallel ranks: masters, moments and forward copies of the tensors that are not split. Over
    data-parallel ranks: forward copies and frozen weights, unless the engine shards them. Over stages: a tied
    embedding. Over heads: the weights that they share, with their residuals, and what
    they train alike.
    """

    def __init__(self, interval: int, model: BuiltModel, engine: Engine, groups: Groups, tied: bool) -> None:
        self.interval, self.model, self.engine, self.groups, self.tied = interval, model, engine, groups, tied

    def due(self, step: int) -> bool:
        """Whether replicas are compared after update ``step``."""
        return self.interval > 0 and step % self.interval == 0 and self.groups.world > 1

    def run(self, step: int) -> None:
        """Compare; every rank calls it. Raises TrainingError on every rank; those that differ name the tensor."""
        found = [_differing(dict(self._over_tensor_ranks()), self.groups.tensor)]
        found.append(_differing(dict(self._over_data_ranks()), self.groups.data))
        found.append(_differing(dict(self._over_stages()), self.groups.pipe))
        if self.groups.heads is not None:
            found.append(_differing(dict(self._over_heads()), self.groups.heads.link))
        name = next((name for name in found if name), None)
        if all_true(name is None, self.groups.everyone):
            return
        where = f"{name} differs" if name else "a tensor of other ranks differs"
        raise TrainingError(
            f"replicas drifted apart: after update {step} {where} between ranks that must hold the same"
        )

    def _over_tensor_ranks(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.groups.tensor_size == 1:
            return
        alike = {id(t.parameter): t.name for t in self.model.tensors if not t.split}
        for partition in self.engine.state.partitions:
            for fragment in partition.fragments:
                here = slice(fragment.offset, fragment.offset + fragment.numel)
                for kind in ("master", "exp_avg", "exp_avg_sq") if id(fragment.parameter) in alike else ():
                    name = f"{alike[id(fragment.parameter)]} ({kind})"
                    yield name, hash_of(getattr(partition, kind)[here])
        for tensor in self.model.tensors:
            if not tensor.split and not is_sharded(tensor.parameter):
                yield tensor.name, hash_of(tensor.parameter.data)

    def _over_data_ranks(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.groups.data_size == 1:
            return
        for tensor in self.model.tensors:
            if not is_sharded(tensor.parameter):
                own = tensor.parameter.data.reshape(-1)[tensor.start : tensor.start + tensor.numel]
                yield tensor.name, hash_of(own)

    def _over_stages(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        if self.groups.pipe_size > 1 and self.tied:
            own = [tensor.parameter.data for tensor in self.model.tensors if tensor.name == TIED]
            yield TIED, hash_of(own[0]) if own else None

    def _over_heads(self) -> Iterator[tuple[str, torch.Tensor]]:
        for weight in folded_weights(self.model.layers):
            name = next(t.name for t in self.model.tensors if t.parameter is weight.parameter)
            yield name, hash_of(weight.value())
        shared = {id(p) for p in shared_parameters(self.model.module)}
        for tensor in self.model.tensors:
            if id(tensor.parameter) in shared and not is_sharded(tensor.parameter):
                yield tensor.name, hash_of(tensor.parameter.data)


def _differing(hashes: Mapping[str, torch.Tensor | None], group: Any) -> str | None:
    """The first tensor whose hash is not that of all ranks of ``group`` that have one; every rank gets the same.

    Every rank calls it with the same names; None: it has no such tensor.
    """
    if not hashes or group_size(group) == 1:
        return None
    known = [value for value in hashes.values() if value is not None]
    device = known[0].device if known else device_of(group)
    own = torch.stack([_NONE.to(device) if value is None else value.to(device) for value in hashes.values()])
    has = torch.tensor([value is not None for value in hashes.values()], device=device)
    mixed = (own * (2 * torch.arange(len(own), device=device) + 1)).sum()
    if _agree(mixed[None], has.all()[None], group).all():
        return None
    equal = _agree(own, has, group).tolist()
    return next((name for name, same in zip(hashes, equal, strict=True) if not same), None)


def _agree(values: torch.Tensor, has: torch.Tensor, group: Any) -> torch.Tensor:
    """Which of the int64 ``values`` are the same on all ranks of ``group`` that have them."""
    both = torch.where(has, torch.stack((values, -1 - values)), torch.iinfo(torch.int64).min)
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0] == -1 - both[1]
