"""What of a run goes into a checkpoint, by logical name, and how it comes back.

| kind                        | logical tensor                       | dtype             |
|-----------------------------|--------------------------------------|-------------------|
| master, exp_avg, exp_avg_sq | every trained tensor                 | float32 (float64) |
| weight, residual            | every frozen W, per logical matrix   | as trained        |
| clock                       | births of the vectors of a factor    | int64 [r]         |
| pool                        | candidates of a factor               | as master         |

Names and shapes are those of the whole model: a fused projection is saved as its logical matrices, a
ZeRO fragment as a range of a logical tensor. So files do not depend on the layout that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.pieces import Piece, full_box
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import folded_weights
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.lowrank.state import FlatPartition, OptimizerStateView
from megalowrank.methods.base import Method
from megalowrank.models.build import BuiltModel, LogicalTensor

MOMENTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Elements [start, start + storage.numel()) of a logical tensor: ``storage`` is a live 1-D view."""

    name: str
    shape: tuple[int, ...]
    start: int
    storage: torch.Tensor


class RunTensors:
    """The tensors of a run on this rank, for saving and for loading."""

    def __init__(self, model: BuiltModel, state: OptimizerStateView, method: Method, data_rank: int) -> None:
        self.model, self.state, self.method, self.data_rank = model, state, method, data_rank
        self._by_parameter: dict[int, list[LogicalTensor]] = {}
        for tensor in model.tensors:
            self._by_parameter.setdefault(id(tensor.parameter), []).append(tensor)

    def pieces(self) -> list[Piece]:
        """What this rank writes; a tensor that every rank holds is written by the first one."""
        first = self.data_rank == 0
        found = [_piece(part) for part in self._optimizer_parts() if self.state.masters_sharded or first]
        found += [_piece(part) for part, whole in self._weight_parts() if first or not whole]
        for saved in self.method.saved_tensors():
            if saved.rows.numel():
                found.append(Piece.rows(f"pool/{saved.name}", saved.shape, saved.first, saved.step, saved.rows))
        if first:
            found += [Piece.whole(name, torch.from_numpy(births)) for name, births in self._clocks()]
        return found

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Global shape and type of every tensor that a checkpoint of this run has; the same on all ranks."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"pool/{saved.name}": (saved.shape, saved.rows.dtype) for saved in self.method.saved_tensors()
        }
        found.update({name: (births.shape, torch.int64) for name, births in self._clocks()})
        frozen = {id(folded.parameter): folded for folded in self._folded()}
        for tensor in self.model.tensors:
            folded = frozen.get(id(tensor.parameter))
            if folded is None:
                found.update({f"{kind}/{tensor.name}": (tensor.shape, self.state.dtype) for kind in MOMENTS})
            else:
                found[f"weight/{tensor.name}"] = tensor.shape, tensor.parameter.dtype
                if folded.residual is not None:
                    found[f"residual/{tensor.name}"] = tensor.shape, folded.residual.dtype
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Read everything back; a missing, surplus or misshapen tensor is a ConfigError on every rank.

        Every rank calls it; the engine's ``reload`` has to follow.
        """
        self._check(checkpoint)
        for part in self._optimizer_parts():
            _fill(part, checkpoint)
        for part, _ in self._weight_parts():
            _fill(part, checkpoint)
        for folded in self._folded():
            folded.update_mirror()
        for saved in self.method.saved_tensors():
            if saved.rows.numel():
                box = ((saved.first, saved.shape[0], saved.step), (0, saved.shape[1], 1))
                saved.rows.view(-1).copy_(checkpoint.read(f"pool/{saved.name}", box))
        births = self.state.clocks.births.copy()
        for name, position in zip((name for name, _ in self._clocks()), self.state.clocks.first, strict=True):
            values = checkpoint.read(name).numpy()
            births[position : position + len(values)] = values
        self.state.clocks.load(births)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Compare all names, shapes and types, whatever this rank holds of them, so that no rank goes on alone."""
        expected, present = self.expected(), set(checkpoint.names())
        for problem, names in (("lacks", expected.keys() - present), ("has a surplus", present - expected.keys())):
            if names:
                raise ConfigError(
                    f"the checkpoint {checkpoint.path.name} {problem} tensor {sorted(names)[0]}",
                    f"{len(names)} such tensors",
                    "a checkpoint of the same model, method, rank and precision",
                )
        for name, (shape, dtype) in expected.items():
            if tuple(checkpoint.shape(name)) != tuple(shape):
                raise ConfigError(f"{name} in the checkpoint has another shape", checkpoint.shape(name), tuple(shape))
            if checkpoint.dtype(name) != dtype:
                raise ConfigError(f"{name} in the checkpoint has another precision", checkpoint.dtype(name), dtype)

    def set_updates(self, updates: int) -> None:
        """Tell every partition how many optimizer steps it has taken."""
        for partition in self.state.partitions:
            partition.updates = updates

    def _folded(self) -> list[FoldedWeight]:
        return folded_weights(self.model.layers)

    def _clocks(self) -> Iterator[tuple[str, np.ndarray]]:
        clocks = self.state.clocks
        for j, layer in enumerate(self.model.layers):
            for side, factor in enumerate("AB"):
                first = int(clocks.first[2 * j + side])
                yield f"clock/{layer.name}.{factor}", clocks.births[first : first + layer.rank].copy()

    def _optimizer_parts(self) -> Iterator[Part]:
        for partition in self.state.partitions:
            for kind in MOMENTS:
                yield from self._cut(partition, kind)

    def _cut(self, partition: FlatPartition, kind: str) -> Iterator[Part]:
        flat = getattr(partition, kind)
        for fragment in partition.fragments:
            stored = flat[fragment.offset : fragment.offset + fragment.numel]
            for tensor in self._by_parameter[id(fragment.parameter)]:
                yield from _overlap(kind, tensor, stored, fragment.start)

    def _weight_parts(self) -> Iterator[tuple[Part, bool]]:
        """Parts of frozen weights, and whether every rank holds the whole weight."""
        for folded in self._folded():
            piece = folded.locate()
            whole = piece.flat.numel() == folded.out_features * folded.in_features
            stored = {"weight": piece.flat}
            if folded.residual is not None:
                stored["residual"] = folded.residual
            for kind, flat in stored.items():
                yield from ((part, whole) for part in self._parts_of(kind, folded, flat, piece.start))

    def _parts_of(self, kind: str, folded: FoldedWeight, flat: torch.Tensor, start: int) -> Iterator[Part]:
        for tensor in self._by_parameter[id(folded.parameter)]:
            yield from _overlap(kind, tensor, flat, start)


def _overlap(kind: str, tensor: LogicalTensor, stored: torch.Tensor, start: int) -> Iterator[Part]:
    """The part of ``tensor`` in ``stored``, which holds elements [start, …) of its parameter."""
    low = max(start, tensor.start)
    high = min(start + stored.numel(), tensor.start + torch.Size(tensor.shape).numel())
    if low < high:
        yield Part(f"{kind}/{tensor.name}", tensor.shape, low - tensor.start, stored[low - start : high - start])


def _piece(part: Part) -> Piece:
    return Piece.fragment(part.name, part.shape, part.start, part.storage)


def _fill(part: Part, checkpoint: Checkpoint) -> None:
    flat = (part.start, part.start + part.storage.numel())
    part.storage.copy_(checkpoint.read(part.name, full_box(part.shape), flat))
