"""Two checkpoints, tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch

from inspecting.facts import chunks
from megalowrank.checkpoint.io import Checkpoint

_CONTENT = ("attempts", "updates", "method_state")


def compare(one: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """What differs: names in one of them alone, tensors by name, entries of the state; ``equal`` if nothing does.

    The configuration of the run (folders, layout, versions) is no difference.
    """
    names, others = set(one.names()), set(other.names())
    tensors = {name: difference(one, other, name) for name in sorted(names & others)}
    different = {name: found for name, found in tensors.items() if found}
    state = [key for key in _CONTENT if one.state.get(key) != other.state.get(key)]
    state += ["step"] if one.step != other.step else []
    found = {
        "one": str(one.path),
        "other": str(other.path),
        "tensors": len(tensors),
        "only_in_one": sorted(names - others),
        "only_in_other": sorted(others - names),
        "different": different,
        "state": state,
    }
    return {"equal": not (different or state or names ^ others), **found}


def difference(one: Checkpoint, other: Checkpoint, name: str) -> dict[str, Any]:
    """How a tensor differs; empty if it is equal bit by bit.

    ``absolute`` is the largest difference of two elements, ``relative`` the same over the largest element of both
    tensors, ``elements`` how many have other bits. Elements that are not finite differ by infinity.
    """
    kinds = [(list(it.shape(name)), str(it.dtype(name)).removeprefix("torch.")) for it in (one, other)]
    if kinds[0] != kinds[1]:
        return {"shapes": [kind[0] for kind in kinds], "dtypes": [kind[1] for kind in kinds]}
    absolute, largest, elements = 0.0, 0.0, 0
    for a, b in zip(chunks(one, name), chunks(other, name), strict=True):
        apart = _apart(a, b)
        elements += int(apart.sum())
        left, right = a.double(), b.double()
        largest = max(largest, _largest(left), _largest(right))
        gap = (left[apart] - right[apart]).abs().nan_to_num(torch.inf)
        absolute = max(absolute, float(gap.max())) if gap.numel() else absolute
    if not elements:
        return {}
    relative = absolute / largest if largest else absolute
    return {"elements": elements, "absolute": absolute, "relative": relative}


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements have other bits."""
    size = a.element_size()
    return (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, size).any(1)


def _largest(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
