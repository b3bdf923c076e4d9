"""What of a run goes into a checkpoint, by logical name, and how it comes back.

| kind                        | logical tensor                       | dtype             |
|-----------------------------|--------------------------------------|-------------------|
| master, exp_avg, exp_avg_sq | every trained tensor                 | float32 (float64) |
| weight, residual            | every frozen W, per logical matrix   | as trained        |
| weight                      | what else is not trained             | as trained        |
| fixed                       | every factor without gradient        | as trained        |
| clock                       | births of the vectors of a factor    | int64 [r]         |
| pool                        | candidates of a factor               | as master         |

Names and shapes are those of the whole model: a fused projection is saved as its logical matrices, a
ZeRO fragment as a range of a logical tensor. So files do not depend on the layout that wrote them. Where heads train
apart, names of all that is not a weight begin with ``head0/``, ``head1/``, …
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megalowrank.checkpoint.heads import SHARED, head_prefix
from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.pieces import DTYPES, Box, Flat, Piece, box_numel
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import FixedFactor, folded_weights, frozen_tensors
from megalowrank.lowrank.fold import FoldedWeight, FrozenTensor, split_residual
from megalowrank.lowrank.state import FlatPartition, OptimizerStateView
from megalowrank.methods.base import Method, SavedTensor
from megalowrank.models.build import BuiltModel, LogicalTensor
from megalowrank.parallel.collectives import gather_texts
from megalowrank.parallel.groups import Groups
from megalowrank.parallel.partition import Share

MOMENTS = ("master", "exp_avg", "exp_avg_sq")
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Part:
    """Elements ``flat`` of ``box`` of a logical tensor, in ``storage``, a live 1-D view.

    ``kept`` are the elements of ``storage`` that are not padding; None: as many as ``flat`` has, from the first.
    ``tensor`` is the logical tensor on this rank.
    """

    name: str
    tensor: LogicalTensor
    box: Box
    flat: Flat
    storage: torch.Tensor
    kept: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """The elements without padding."""
        return self.storage[: self.flat[1] - self.flat[0]] if self.kept is None else self.storage[self.kept]

    def fill(self, values: torch.Tensor) -> None:
        """Overwrite them; padding stays."""
        if self.kept is None:
            self.storage[: values.numel()].copy_(values)
        else:
            self.storage[self.kept] = values.to(self.storage.device, self.storage.dtype)


class RunTensors:
    """The tensors of a run on this rank, for saving and for loading."""

    def __init__(self, model: BuiltModel, state: OptimizerStateView, method: Method, groups: Groups) -> None:
        self.model, self.state, self.method, self.groups = model, state, method, groups
        self._by_parameter: dict[int, list[LogicalTensor]] = {}
        for tensor in model.tensors:
            self._by_parameter.setdefault(id(tensor.parameter), []).append(tensor)

    def pieces(self) -> list[Piece]:
        """What this rank writes; of a tensor that several ranks hold, the first one writes it."""
        first = self.groups.data_rank == 0
        parts = [part for part in self._optimizer_parts() if self.state.masters_sharded or first]
        held = (*self._weight_parts(), *self._fixed_parts()) if self.groups.head == 0 else self._fixed_parts()
        parts += [part for part, whole in held if first or not whole]
        found = [_piece(part) for part in parts if self._writes(part.tensor)]
        for saved in self.method.saved_tensors():
            if saved.rows.numel() and (saved.columns.padded < saved.columns.size or self.groups.tensor_rank == 0):
                found.append(_pool_piece(saved))
        if first and self.groups.tensor_rank == 0:
            found += [Piece.whole(name, torch.from_numpy(births)) for name, births in self._clocks()]
        return [replace(piece, name=self._stored(piece.name)) for piece in found]

    def _stored(self, name: str) -> str:
        """The name under which this rank's head keeps a tensor."""
        shared = self.groups.heads is None or name.startswith(SHARED)
        return name if shared else f"{head_prefix(self.groups.head)}{name}"

    def _writes(self, tensor: LogicalTensor) -> bool:
        return not tensor.replica and (tensor.split or self.groups.tensor_rank == 0)

    def expected(self) -> Expected:
        """Global shape and type of every tensor of this stage that a head of this run has."""
        found: Expected = {
            f"pool/{saved.name}": (saved.shape, saved.rows.dtype) for saved in self.method.saved_tensors()
        }
        found.update({name: (births.shape, torch.int64) for name, births in self._clocks()})
        frozen: dict[int, FrozenTensor] = {id(f.parameter): f for f in (*self._folded(), *self.model.module.frozen)}
        fixed = {id(factor.parameter) for factor in self._fixed()}
        for tensor in self.model.tensors:
            folded = frozen.get(id(tensor.parameter))
            if id(tensor.parameter) in fixed:
                found[f"fixed/{tensor.name}"] = tensor.shape, tensor.parameter.dtype
            elif folded is None:
                found.update({f"{kind}/{tensor.name}": (tensor.shape, self.state.dtype) for kind in MOMENTS})
            else:
                found[f"weight/{tensor.name}"] = tensor.shape, tensor.parameter.dtype
                if isinstance(folded, FoldedWeight) and folded.residual is not None:
                    found[f"residual/{tensor.name}"] = tensor.shape, folded.residual.dtype
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Read everything back; a missing, surplus or misshapen tensor is a ConfigError on every rank.

        Every rank calls it; the engine's ``reload`` has to follow.
        """
        check_tensors(checkpoint, self._expected_of_all_heads())
        held = (*self._weight_parts(), *self._fixed_parts())
        for part in (*self._optimizer_parts(), *(part for part, _ in held)):
            part.fill(checkpoint.read(self._stored(part.name), part.box, part.flat))
        self._update_mirrors()
        for saved in self.method.saved_tensors():
            if saved.rows.numel():
                values = checkpoint.read(self._stored(f"pool/{saved.name}"), _pool_box(saved))
                saved.rows[:, : saved.columns.real].copy_(values.view(len(saved.rows), -1))
        births = self.state.clocks.births.copy()
        for name, position in zip((name for name, _ in self._clocks()), self.state.clocks.first, strict=True):
            saved_births = checkpoint.read(self._stored(name)).numpy()
            births[position : position + len(saved_births)] = saved_births
        self.state.clocks.load(births)

    def load_weights(self, saved: SavedWeights) -> None:
        """Take merged weights alone; factors and the optimizer stay as they are when a run begins.

        Every rank calls it; the engine's ``reload`` has to follow. Raises ConfigError for weights of another model.
        """
        saved.check_covered({tensor.name for tensor in self.model.tensors}, self.groups.pipe)
        residuals = {t.name: w.residual for w in self._folded() for t in self._by_parameter[id(w.parameter)]}
        masters = (p for p in self._optimizer_parts() if p.name.startswith("master/") and not p.tensor.is_factor)
        for part in (*masters, *(part for part, _ in self._weight_parts())):
            value, residual = saved.read(part.tensor.name, part.tensor.shape), residuals.get(part.tensor.name)
            if residual is not None:
                value = split_residual(value, residual.dtype)[part.name.startswith("residual/")]
            box = value[tuple(slice(*sides) for sides in part.box)]
            part.fill(box.reshape(-1)[slice(*part.flat)])
        self._update_mirrors()

    def _update_mirrors(self) -> None:
        for frozen in (*frozen_tensors(self.model.layers), *self.model.module.frozen):
            frozen.locate().update_mirror()

    def _expected_of_all_heads(self) -> Expected:
        """``expected`` of the whole job by the names in files; every rank calls it and gets the same."""
        own, heads = self._expected_of_all_stages(), self.groups.heads
        if heads is None:
            return own
        shared = {name: what for name, what in own.items() if name.startswith(SHARED)}
        names = [(head_prefix(head) + name, name) for head in range(heads.count) for name in own.keys() - shared.keys()]
        return {**shared, **{stored: own[name] for stored, name in names}}

    def _expected_of_all_stages(self) -> Expected:
        """``expected`` of the whole model; every rank calls it and gets the same."""
        own = {name: (shape, str(dtype).removeprefix("torch.")) for name, (shape, dtype) in self.expected().items()}
        found: Expected = {}
        for text in gather_texts(json.dumps(own), self.groups.pipe):
            found.update({name: (tuple(shape), DTYPES[dtype]) for name, (shape, dtype) in json.loads(text).items()})
        return found

    def set_updates(self, updates: int) -> None:
        """Tell every partition how many optimizer steps it has taken."""
        for partition in self.state.partitions:
            partition.updates = updates

    def _folded(self) -> list[FoldedWeight]:
        return folded_weights(self.model.layers)

    def _fixed(self) -> list[FixedFactor]:
        return [fixed for layer in self.model.layers for fixed in layer.fixed]

    def _clocks(self) -> Iterator[tuple[str, np.ndarray]]:
        clocks = self.state.clocks
        for j, layer in enumerate(self.model.layers):
            for side, factor in enumerate("AB"):
                first = int(clocks.first[2 * j + side])
                yield f"clock/{layer.name}.{factor}", clocks.births[first : first + layer.rank].copy()

    def _fixed_parts(self) -> Iterator[tuple[Part, bool]]:
        """As ``_weight_parts``, of factors without gradient."""
        for fixed in self._fixed():
            piece = fixed.locate()
            whole = piece.flat.numel() == fixed.rank * fixed.length.padded
            for tensor in self._by_parameter[id(fixed.parameter)]:
                yield from ((part, whole) for part in _overlap("fixed", tensor, piece.flat, piece.start))

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
        """Parts of frozen weights, and whether every data-parallel rank holds the same."""
        for folded in self._folded():
            piece = folded.locate()
            whole = piece.flat.numel() == folded.out_features * folded.in_features
            stored = {"weight": piece.flat}
            if folded.residual is not None:
                stored["residual"] = folded.residual
            for kind, flat in stored.items():
                yield from ((part, whole) for part in self._parts_of(kind, folded, flat, piece.start))
        for frozen in self.model.module.frozen:
            piece = frozen.locate()
            whole = piece.flat.numel() == sum(t.numel for t in self._by_parameter[id(frozen.parameter)])
            yield from ((part, whole) for part in self._parts_of("weight", frozen, piece.flat, piece.start))

    def _parts_of(self, kind: str, frozen: FrozenTensor, flat: torch.Tensor, start: int) -> Iterator[Part]:
        for tensor in self._by_parameter[id(frozen.parameter)]:
            yield from _overlap(kind, tensor, flat, start)


def check_tensors(checkpoint: Checkpoint, expected: Expected) -> None:
    """Raise ConfigError unless names, shapes and types are those expected.

    Given the tensors of all stages it does the same on all ranks, so that none goes on alone.
    """
    present = set(checkpoint.names())
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


def _overlap(kind: str, tensor: LogicalTensor, stored: torch.Tensor, start: int) -> Iterator[Part]:
    """The part of ``tensor`` in ``stored``, which holds elements [start, …) of its parameter, if it is not empty."""
    low = max(start, tensor.start)
    high = min(start + stored.numel(), tensor.start + tensor.numel)
    if low >= high:
        return
    inside = (low - tensor.start, high - tensor.start)
    flat = _real_before(tensor.shares, inside[0]), _real_before(tensor.shares, inside[1])
    if flat[0] < flat[1]:
        box = tuple((part.start, part.stop, 1) for part in tensor.shares)
        storage = stored[low - start : high - start]
        yield Part(f"{kind}/{tensor.name}", tensor, box, flat, storage, _kept(tensor.shares, inside, storage.device))


def _real_before(shares: tuple[Share, ...], index: int) -> int:
    """How many of the first ``index`` elements of a padded row-major block are not padding."""
    rows, columns = shares[0], shares[1] if len(shares) == 2 else Share(1, 0, 1, 1)
    row, column = divmod(index, columns.padded)
    return min(row, rows.real) * columns.real + (min(column, columns.real) if row < rows.real else 0)


def _kept(shares: tuple[Share, ...], inside: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """The elements [begin, end) of the block that are not padding, counted from ``begin``; None if they come first."""
    if len(shares) == 1 or shares[1].real == shares[1].padded:
        return None
    index = torch.arange(*inside, device=device)
    real = (index % shares[1].padded < shares[1].real) & (index // shares[1].padded < shares[0].real)
    return torch.nonzero(real)[:, 0]


def _piece(part: Part) -> Piece:
    return Piece(part.name, part.tensor.shape, part.box, part.flat, part.values().detach())


def _pool_box(saved: SavedTensor) -> Box:
    slots = saved.shape[0]
    return (min(saved.first, slots), slots, saved.step), (saved.columns.start, saved.columns.stop, 1)


def _pool_piece(saved: SavedTensor) -> Piece:
    box, rows = _pool_box(saved), saved.rows[:, : saved.columns.real]
    return Piece(f"pool/{saved.name}", saved.shape, box, (0, box_numel(box)), rows.reshape(-1))
