"""Runs put together from what all ranks hold, and how far two of them are apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.shards import RunTensors
from megalowrank.lowrank.fold import join_residual

Tensors = dict[str, torch.Tensor]


@dataclass
class Run:
    """Losses of all updates, then of an evaluation; the state after the last; numbers of the method.

    ``start`` is a hash of weights, factors and candidates before the first update; ``padding`` counts elements that
    belong to no logical tensor and are not zero.
    """

    losses: list[float]
    norms: list[float]
    tensors: Tensors
    counters: dict[str, float]
    start: str = ""
    padding: int = 0


def logical(tensors: RunTensors, world: int) -> Tensors:
    """Every tensor of a checkpoint, whole, in float64, put together from what all ranks would write.

    Collective. An element that no rank or more than one rank writes is an error.
    """
    shapes = {name: shape for name, (shape, _) in tensors._expected_of_all_stages().items()}
    values = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
    counts = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
    for piece in tensors.pieces():
        for whole, part in ((values, piece.tensor.double()), (counts, torch.ones(piece.tensor.numel()).double())):
            _place(whole[piece.name], piece, part)
    flat, count = (torch.cat([t.view(-1) for t in whole.values()]) for whole in (values, counts))
    if world > 1:
        dist.all_reduce(flat)
        dist.all_reduce(count)
    assert bool((count == 1).all()), "an element that is written never, or twice"
    sizes = [t.numel() for t in values.values()]
    found = {name: t.clone() for name, t in zip(values, flat.split(sizes), strict=True)}
    for name in [name for name in found if name.startswith("residual/")]:
        weight = name.replace("residual/", "weight/")
        found[weight] = join_residual(found[weight].bfloat16(), found.pop(name).to(torch.int16)).double()
    return found


def digest(tensors: Tensors) -> str:
    """A hash of all bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def padding(tensors: RunTensors) -> int:
    """Elements of masters, moments, weights and candidates that are padding but not zero, on this rank."""
    parts = [*tensors._optimizer_parts(), *(part for part, _ in tensors._weight_parts())]
    strange = sum(int(part.storage.count_nonzero() - part.values().count_nonzero()) for part in parts)
    pools = [saved.rows[:, saved.columns.real :] for saved in tensors.method.saved_tensors()]
    return strange + sum(int(rows.count_nonzero()) for rows in pools)


def _place(whole: torch.Tensor, piece: Piece, part: torch.Tensor) -> None:
    box = whole[tuple(slice(*sides) for sides in piece.box)]
    flat = box.reshape(-1).clone()
    flat[piece.flat[0] : piece.flat[1]] += part
    box.copy_(flat.view(box.shape))


def difference(found: Run, expected: Run) -> dict[str, float]:
    """The largest absolute difference per kind of tensor (NaN: infinite), of losses and of gradient norms.

    Of norms above 1 it is relative. ``mean`` is the mean absolute difference of masters and weights.
    """
    assert found.tensors.keys() == expected.tensors.keys()
    report: dict[str, float] = {}
    for name, tensor in found.tensors.items():
        worst = float((tensor - expected.tensors[name]).abs().max()) if tensor.numel() else 0.0
        kind = name.split("/")[0]
        report[kind] = max(report.get(kind, 0.0), worst if worst == worst else float("inf"))
    both = [
        (found.tensors[n] - expected.tensors[n]).abs() for n in found.tensors if n.startswith(("master/", "weight/"))
    ]
    report["mean"] = float(torch.cat(both).mean())
    for kind in ("losses", "norms"):
        pairs = zip(getattr(found, kind), getattr(expected, kind), strict=True)
        report[kind] = max(abs(a - b) / max(1.0, abs(b)) if a == a or b == b else 0.0 for a, b in pairs)
    return report
