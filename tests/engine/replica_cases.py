"""Ranks of the replica check: one bit is flipped on one rank, in every kind of tensor that ranks hold alike."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.engine.replicas import ReplicaCheck, hash_of
from megalowrank.engine.zero import initialize_distributed
from megalowrank.errors import TrainingError
from tests.engine.layout_cases import Divided


def flip_one_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flip a bit of a float32 element in place."""
    bits = tensor.view(-1).view(torch.int32)
    bits[element] ^= 1 << bit


def target_of(divided: Divided, name: str, kind: str) -> torch.Tensor:
    """The live tensor called ``name`` on this rank: its forward copy, or what an optimizer partition holds of it."""
    tensor = next(t for t in divided.model.tensors if t.name == name)
    if kind == "forward":
        return tensor.parameter.data
    places = [(p, f) for p in divided.engine.state.partitions for f in p.fragments if f.parameter is tensor.parameter]
    partition, fragment = places[0]
    return getattr(partition, kind)[fragment.offset : fragment.offset + fragment.numel]


def drift(case: dict[str, Any]) -> dict[str, Any]:
    """Whether the check passes before the flip on the last rank, and what it says afterwards."""
    divided = Divided.start(case)
    check = ReplicaCheck(5, divided.model, divided.engine, divided.groups, divided.tied)
    check.run(0)
    flipped = dist.get_rank() == dist.get_world_size() - 1
    if flipped:
        flip_one_bit(target_of(divided, case["tensor"], case["kind"]), case.get("element", 3), case["bit"])
    try:
        check.run(10)
        said = ""
    except TrainingError as error:
        said = str(error)
    due = [step for step in range(12) if check.due(step)]
    divided.engine.close()
    gc.collect()
    return {"said": said, "due": due}


def run(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case, one after the other."""
    initialize_distributed(None)
    return [drift(case) for case in payload["cases"]]


def hashes(payload: dict[str, Any]) -> list[bool]:
    """Whether a flip of each bit of an element changes the hash."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = hash_of(values)
    found = []
    for bit in range(32):
        changed = values.clone()
        flip_one_bit(changed, payload["element"], bit)
        found.append(bool(hash_of(changed) != before))
    return found
