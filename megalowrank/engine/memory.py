"""Bytes that a run really holds on this rank, beside what ``models.accounting`` predicted."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalowrank.lowrank.factors import LowRankFactors, folded_weights
from megalowrank.methods.base import Method
from megalowrank.models.accounting.memory import Bytes
from megalowrank.models.accounting.table import human


def measured_bytes(engine: Any, method: Method, layers: Sequence[LowRankFactors]) -> dict[str, int]:
    """Bytes by category, as ``predicted_bytes`` names them, device and host together; call it between updates.

    ``engine`` is a dense or a ZeRO engine. Memory that two categories share counts in the first. Gradients are
    not measured: between updates they are mostly gone. Under ZeRO-3 gathered parameters count while they are.
    """
    parameters = list(engine.module.parameters())
    folded = folded_weights(layers)
    partitions = engine.state.partitions
    tensors = {
        "weights": _stored(p for p in parameters if p.requires_grad),
        "frozen W": _stored(p for p in parameters if not p.requires_grad),
        "fold residual": [weight.residual for weight in folded if weight.residual is not None],
        "masters": [partition.master for partition in partitions],
        "moments": [moment for partition in partitions for moment in (partition.exp_avg, partition.exp_avg_sq)],
    }
    found: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for name, held in tensors.items():
        before = _covered(spans)
        spans += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held if t.numel()]
        found[name] = _covered(spans) - before
    return {**found, **method.memory()}


def _stored(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """What holds the parameters: their data and, under ZeRO-3, their shards."""
    found: list[torch.Tensor] = []
    for parameter in parameters:
        found.append(parameter.data)
        if hasattr(parameter, "ds_tensor"):
            found.append(parameter.ds_tensor.data)
    return found


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """Bytes in the union of address ranges."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a CUDA device, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_memory(device: torch.device) -> int:
    """Bytes held now: allocated on a CUDA device, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_report(predicted: Mapping[str, Bytes], measured: Mapping[str, int]) -> list[str]:
    """Lines of text for the end of a run: category, predicted, measured, difference in percent.

    What was only predicted, or only measured, has a dash in the other column; empty categories are left out.
    """
    lines = [f"{'memory of one rank':<24}{'predicted':>14}{'measured':>14}{'difference':>12}"]
    for name in dict.fromkeys((*predicted, *measured)):
        expected, actual = predicted[name].total if name in predicted else 0, measured.get(name, 0)
        if not expected and not actual:
            continue
        both = name in measured and expected
        difference = f"{100 * (actual - expected) / expected:+.2f} %" if both else "-"
        lines.append(f"{name:<24}{human(expected):>14}{human(actual):>14}{difference:>12}")
    return lines
