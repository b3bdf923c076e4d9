"""Sharded optimizer state, seen as vectors of factors.

``OptimizerStateView`` is the only way a method reaches masters, moments, clocks and forward copies.
It works on *partitions*: flat 1-D tensors that hold this rank's part of the fp32 masters and moments
of many parameters, whatever cut them (ZeRO 1 to 3, or nothing). No full weight is ever gathered, and of moments
only those of one factor at a time, by ``rotate``; reading a few vectors costs one small all-reduce.

Shapes: a packed tensor is 1-D, the values of a ``VectorSet`` one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from megalowrank.lowrank.factors import FactorPlace, FixedFactor, LowRankFactors
from megalowrank.lowrank.subspace import SubspaceSearch
from megalowrank.lowrank.vectors import VectorSet, clip_runs, element_index
from megalowrank.parallel.collectives import group_size, mean_over, sum_over
from megalowrank.parallel.partition import Share, share


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, stored at ``offset`` of a flat tensor."""

    parameter: torch.nn.Parameter
    offset: int
    start: int
    numel: int


@dataclass
class FlatPartition:
    """This rank's masters and moments of some parameters, in one flat tensor each.

    ``gradients``: (tensor whose ``.grad`` is used, offset in the partition), ascending; together they
    cover the partition. ``fragments``: where each parameter lies. ``updates``: optimizer steps taken.
    """

    master: torch.Tensor
    gradients: list[tuple[torch.Tensor, int]]
    fragments: list[Fragment]
    exp_avg: torch.Tensor = field(init=False)
    exp_avg_sq: torch.Tensor = field(init=False)
    updates: int = 0

    def __post_init__(self) -> None:
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)


@dataclass(frozen=True)
class MomentPiece:
    """Elements [start, start + numel) of a flattened factor: views of the moments that this rank holds."""

    start: int
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True)
class Spread:
    """How the model is spread over ranks beside data parallelism: where the factors here belong, and the groups.

    Without ``places`` the factors here are all there are.
    """

    places: Sequence[FactorPlace] | None = None
    tensor: Any = None
    pipe: Any = None


class Clocks:
    """Birth of every vector: the number of updates done when its Adam clock was last restarted.

    Replicated on all ranks and never communicated: a restart writes an integer. Index 0 belongs to
    everything that is not a vector of a factor and is never restarted. A vector that is *held* is not updated, and its
    clock stands still since ``since``.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.first = 1 + np.cumsum(rows) - rows
        self.births = np.zeros(1 + int(rows.sum()), dtype=np.int64)
        self.held, self.since = np.zeros(len(self.births), dtype=bool), np.zeros_like(self.births)
        self.version = self.holds = 0

    def hold(self, vectors: VectorSet, since: int) -> None:
        """From the update after ``since`` on these vectors are left as they are, weights and moments."""
        index = self.first[vectors.factors] + vectors.rows
        self.held[index], self.since[index] = True, since
        self.holds += 1

    def release(self, vectors: VectorSet, updates: int) -> None:
        """The next update moves these vectors again; those that were held are older by nothing meanwhile."""
        index = self.first[vectors.factors] + vectors.rows
        index = index[self.held[index]]
        self.births[index] += updates - self.since[index]
        self.held[index] = False
        self.holds += 1

    def restart(self, vectors: VectorSet, updates: int) -> None:
        """The next update is the first of these vectors."""
        self.births[self.first[vectors.factors] + vectors.rows] = updates
        self.version += 1

    def load(self, births: np.ndarray) -> None:
        """Take over saved births, int64 of the same length."""
        self.births[:] = births
        self.version += 1


class ForwardCopy(Protocol):
    """What the forward pass reads: the low-precision (or only) copy of the factors."""

    dtype: torch.dtype
    device: torch.device

    def read(self, vectors: VectorSet) -> torch.Tensor | None:
        """Packed values on this rank, without communication; None where they are sharded."""

    def write(self, vectors: VectorSet, packed: torch.Tensor) -> None:
        """Overwrite the vectors wherever this rank holds a part of them."""


class FlatForwardCopy:
    """Forward copies that are whole on every rank and lie in one flat tensor (ZeRO 0, 1, 2, dense)."""

    def __init__(self, flat: torch.Tensor, offsets: np.ndarray) -> None:
        self.flat, self.offsets = flat, offsets
        self.dtype, self.device = flat.dtype, flat.device

    def read(self, vectors: VectorSet) -> torch.Tensor:
        return self.flat.index_select(0, self._index(vectors))

    def write(self, vectors: VectorSet, packed: torch.Tensor) -> None:
        self.flat.index_copy_(0, self._index(vectors), packed.to(self.dtype))

    def _index(self, vectors: VectorSet) -> torch.Tensor:
        starts = self.offsets[vectors.factors] + vectors.rows * vectors.lengths
        return element_index(starts, vectors.lengths, self.device)


class OptimizerStateView:
    """The verbs of a method on sharded optimizer state.

    Every rank of the data-parallel group calls every verb with the same vectors; only the reads, ``rotate`` and the
    sums communicate. ``factors`` lists A and Bᵀ of this rank's matrix 0, A and Bᵀ of matrix 1, …; a vector is what this
    rank holds of it, and ``places`` says where that belongs in the model. Of a factor without gradient there are no
    vectors here, but ``read_fixed`` and ``write_fixed``.
    """

    def __init__(
        self,
        factors: Sequence[torch.nn.Parameter],
        partitions: list[FlatPartition],
        forward: ForwardCopy,
        group: Any,
        masters_sharded: bool,
        spread: Spread | None = None,
    ) -> None:
        self.partitions, self.forward = partitions, forward
        self.group, self.masters_sharded = group, masters_sharded
        self._factors = {id(p) for p in factors}
        self.shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in factors]
        self._spread = spread or Spread()
        everything = [FactorPlace(i, share(shape[1])) for i, shape in enumerate(self.shapes)]
        self.places: Sequence[FactorPlace] = everything if self._spread.places is None else self._spread.places
        self.clocks = Clocks(np.array([shape[0] for shape in self.shapes], dtype=np.int64))
        self._windows = [_windows(partition, factors) for partition in partitions]
        trained = np.array([p.requires_grad for p in factors], dtype=bool)
        full = np.array([shape[0] * shape[1] for shape in self.shapes], dtype=np.int64) * trained
        self._whole = [np.array_equal(sizes, full) for _, _, sizes in self._windows]
        self._alone = group_size(group) == 1
        flat = forward.flat if isinstance(forward, FlatForwardCopy) else None
        self._one_copy = flat is not None and flat.data_ptr() == partitions[0].master.data_ptr()
        self._located: tuple[VectorSet, list[tuple[torch.Tensor, torch.Tensor | None]]] | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps taken so far."""
        return self.partitions[0].updates

    @property
    def dtype(self) -> torch.dtype:
        """Precision of masters and moments."""
        return self.partitions[0].master.dtype

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs, and where packed values live."""
        return self.forward.device

    def read(
        self, vectors: VectorSet, forward: VectorSet, beside: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masters of ``vectors``, forward values of ``forward`` and the sum of ``beside`` over ranks.

        One all-reduce carries whatever is not already here. ``beside`` is a packed tensor of the
        caller in which each rank filled what it owns and left zeros elsewhere. All three come back
        packed, in the precision of the masters, on ``device``.
        """
        values = self.forward.read(forward)
        if values is not None and self._alone:
            return self._own(vectors), values.to(self.dtype), beside
        wanted = vectors if values is not None else vectors + forward
        buffer = torch.zeros(wanted.numel + beside.numel(), dtype=self.dtype, device=self.device)
        buffer[: wanted.numel] = self._own(wanted)
        buffer[wanted.numel :] = beside
        traveling = buffer if self.masters_sharded else buffer[wanted.numel :]
        if traveling.numel():
            sum_over(traveling, self.group)
        masters, rest = buffer[: vectors.numel], buffer[vectors.numel :]
        if values is not None:
            return masters, values.to(self.dtype), rest
        rounded = rest[: forward.numel].to(self.forward.dtype).to(self.dtype)
        return masters, rounded, rest[forward.numel :]

    def write(self, vectors: VectorSet, packed: torch.Tensor) -> None:
        """Overwrite masters and forward copies; moments and clocks stay."""
        for partition, (here, there) in zip(self.partitions, self._locate(vectors), strict=True):
            values = packed if there is None else packed.index_select(0, there)
            partition.master.index_copy_(0, here, values.to(partition.master.device, partition.master.dtype))
        if not self._one_copy:
            self.forward.write(vectors, packed)

    def read_fixed(self, fixed: FixedFactor) -> torch.Tensor:
        """A factor without gradient [r, length] as the forward pass sees it, in the precision of the masters.

        One all-reduce where it is sharded.
        """
        piece, numel = fixed.locate(), fixed.rank * fixed.length.padded
        flat = piece.flat
        if flat.numel() != numel:
            flat = torch.zeros(numel, dtype=piece.flat.dtype, device=piece.flat.device)
            flat[piece.start : piece.start + piece.flat.numel()] = piece.flat
            sum_over(flat, self.group)
        return flat.to(self.device, self.dtype, copy=True).view(fixed.rank, -1)

    def write_fixed(self, fixed: FixedFactor, values: torch.Tensor) -> None:
        """Overwrite a factor without gradient with ``values`` [r, length] wherever this rank holds a part of it."""
        piece = fixed.locate()
        piece.flat.copy_(values.reshape(-1)[piece.start : piece.start + piece.flat.numel()])
        piece.update_mirror()

    def others(self) -> list[torch.Tensor]:
        """Masters on this rank of what is no factor, as 1-D views; the engine's ``reload`` follows a write."""
        return [
            partition.master[fragment.offset : fragment.offset + fragment.numel]
            for partition in self.partitions for fragment in partition.fragments
            if id(fragment.parameter) not in self._factors
        ]  # fmt: skip

    def exp_avg(self, factor: int) -> torch.Tensor:
        """exp_avg of a trained factor, [r, length], whole on every rank; one all-reduce where it is sharded."""
        whole = torch.zeros(self.shapes[factor], dtype=self.dtype, device=self.device)
        for piece in self.moments(factor):
            whole.view(-1)[piece.start : piece.start + piece.exp_avg.numel()] = piece.exp_avg.to(self.device)
        return sum_over(whole, self.group) if self.masters_sharded else whole

    def rotate(self, factor: int, turn: torch.Tensor) -> None:
        """exp_avg <- turn · exp_avg of a trained factor [r, length], with ``turn`` [r, r] equal on all ranks.

        exp_avg_sq and clocks stay. One all-reduce of the factor's size where moments are sharded.
        """
        turned = (turn.to(self.device, self.dtype) @ self.exp_avg(factor)).view(-1)
        for piece in self.moments(factor):
            piece.exp_avg.copy_(turned[piece.start : piece.start + piece.exp_avg.numel()])

    def zero(self, vectors: VectorSet) -> None:
        """Zero exp_avg and exp_avg_sq of the vectors."""
        for partition, (here, _) in zip(self.partitions, self._locate(vectors), strict=True):
            partition.exp_avg.index_fill_(0, here, 0)
            partition.exp_avg_sq.index_fill_(0, here, 0)

    def moments(self, factor: int) -> list[MomentPiece]:
        """The parts of a factor's moments that this rank holds; writes go through."""
        found = []
        for partition, (offsets, starts, sizes) in zip(self.partitions, self._windows, strict=True):
            if sizes[factor]:
                here = slice(int(offsets[factor]), int(offsets[factor] + sizes[factor]))
                found.append(MomentPiece(int(starts[factor]), partition.exp_avg[here], partition.exp_avg_sq[here]))
        return found

    def sum_over_shards(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum what each rank counted over its own part of the moments of this stage's factors.

        A rank adds nothing for factors not ``counted`` here. Every rank of the stage calls it, all get the sum.
        """
        summed = counts.to(self.device)
        if self.masters_sharded:
            sum_over(summed, self.group)
        return sum_over(summed, self._spread.tensor).to(counts.device)

    def sum_over_stages(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum over pipeline stages what is equal on all ranks of a stage; every rank calls it, all get the sum."""
        if group_size(self._spread.pipe) == 1:
            return counts
        return sum_over(counts.to(self.device, copy=True), self._spread.pipe).to(counts.device)

    def subspace_search(
        self, layers: Sequence[LowRankFactors], randomized: bool, key: tuple[object, ...]
    ) -> SubspaceSearch:
        """A search for the leading subspaces of the gradients of ``layers`` over the ranks of this stage."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return SubspaceSearch(layers, self.group, self._spread.tensor, randomized, key, like)

    def sum_of_parts(self, values: torch.Tensor, length: Share) -> torch.Tensor:
        """Sum over tensor-parallel ranks what each made of its part of vectors of ``length``, if they are divided."""
        return sum_over(values, self._spread.tensor) if length.padded < length.size else values

    def restart_clock(self, vectors: VectorSet) -> None:
        """The next update is update 1 of these vectors for Adam's bias correction."""
        self.clocks.restart(vectors, self.updates)

    def hold(self, vectors: VectorSet, since: int | None = None) -> None:
        """Updates leave masters, moments and clocks of the vectors as they were after ``since`` updates (now)."""
        self.clocks.hold(vectors, self.updates if since is None else since)

    def release(self, vectors: VectorSet) -> None:
        """Updates move the vectors again."""
        self.clocks.release(vectors, self.updates)

    def sum_over_tensor_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place over the tensor-parallel ranks, all of which call it."""
        return sum_over(values, self._spread.tensor)

    def mean_over_data_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Average in place over the data-parallel ranks, all of which call it."""
        return mean_over(values, self.group)

    def _own(self, vectors: VectorSet) -> torch.Tensor:
        """Packed masters on ``device``, zeros where another rank owns them."""
        found = self._locate(vectors)
        if len(found) == 1 and found[0][1] is None:
            return self.partitions[0].master.index_select(0, found[0][0]).to(self.device, non_blocking=True)
        packed = torch.zeros(vectors.numel, dtype=self.dtype, device=self.device)
        for partition, (here, there) in zip(self.partitions, found, strict=True):
            values = partition.master.index_select(0, here).to(self.device, non_blocking=True)
            if there is None:
                packed.copy_(values)
            else:
                packed.index_copy_(0, there, values)
        return packed

    def _locate(self, vectors: VectorSet) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Per partition: element indices in it and in the packed values (None: all of them) of what is here.

        The answer for the last vectors is kept: a method reads what it then writes.
        """
        if self._located is None or self._located[0] is not vectors:
            found = [self._locate_in(i, vectors) for i in range(len(self.partitions))]
            self._located = (vectors, found)
        return self._located[1]

    def _locate_in(self, index: int, vectors: VectorSet) -> tuple[torch.Tensor, torch.Tensor | None]:
        partition, (offsets, starts, sizes) = self.partitions[index], self._windows[index]
        chosen, device = vectors.factors, partition.master.device
        element = vectors.rows * vectors.lengths
        if self._whole[index]:
            return element_index(offsets[chosen] + element, vectors.lengths, device), None
        skipped, left = clip_runs(element, vectors.lengths, starts[chosen], sizes[chosen])
        own = left > 0
        here = (offsets[chosen] + element + skipped - starts[chosen])[own]
        there = (vectors.offsets + skipped)[own]
        return element_index(here, left[own], device), element_index(there, left[own], self.device)


def _windows(
    partition: FlatPartition, factors: Sequence[torch.nn.Parameter]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per factor: offset in the partition, first element owned, elements owned (0: none here)."""
    position = {id(p): i for i, p in enumerate(factors)}
    table = np.zeros((3, len(factors)), dtype=np.int64)
    for fragment in partition.fragments:
        if id(fragment.parameter) in position:
            table[:, position[id(fragment.parameter)]] = (fragment.offset, fragment.start, fragment.numel)
    return table[0], table[1], table[2]
