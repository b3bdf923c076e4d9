"""Which vectors one SwitchLoRA step moves: index arithmetic over all matrices at once, no tensors.

Within a step, the i-th switch of a matrix exchanges its i-th position with its i-th slot. If more are
switched than the FIFO has slots (L), the i-th switch, i >= L, receives the vector that left in switch
i - L, and only the last L that left stay in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.vectors import VectorSet, element_index


@dataclass(frozen=True)
class Geometry:
    """Sizes of all matrices of a rank: ranks and spare candidates [matrices], lengths of its vectors [2 · matrices].

    ``limit`` [matrices] is how many vectors may be frozen or switching at once: half the rank, since positions
    of A and Bᵀ run half a turn apart, and none without spare candidates.
    """

    ranks: np.ndarray
    spare: np.ndarray
    lengths: np.ndarray

    @cached_property
    def limit(self) -> np.ndarray:
        return np.where(self.spare > 0, self.ranks // 2, 0)

    @staticmethod
    def of(layers: Sequence[LowRankFactors]) -> Geometry:
        """Ranks and spare vectors of the logical matrices, lengths of what this rank holds."""
        ranks = np.array([layer.rank for layer in layers], dtype=np.int64)
        smaller = np.array([min(layer.out_features, layer.in_features) for layer in layers], dtype=np.int64)
        lengths = np.array([[layer.columns.padded, layer.rows.padded] for layer in layers], dtype=np.int64)
        return Geometry(ranks, smaller - ranks, lengths.reshape(-1))

    def vectors(self, factors: np.ndarray, rows: np.ndarray) -> VectorSet:
        """The vector set of these rows of these factors."""
        return VectorSet(factors, rows, self.lengths[factors])


@dataclass(frozen=True)
class SwitchPlan:
    """One step. In ``outgoing`` come all vectors of A, matrix by matrix, then all of Bᵀ.

    ``fetched`` are pool slots; ``touched`` are the vectors that the fold needs, V (rows of A) then U
    (rows of Bᵀ); ``counterparts`` lose their optimizer state. ``kept`` and ``recycled`` are set only
    where a matrix switches more vectors than it has slots.
    """

    geometry: Geometry
    counts: np.ndarray
    outgoing: VectorSet
    slots: VectorSet
    fetched: VectorSet
    counterparts: VectorSet
    touched: VectorSet
    switch: np.ndarray
    overflow: bool

    def changed(self, device: torch.device) -> torch.Tensor:
        """Elements of the packed ``touched`` whose vector changes, in the order of ``outgoing``."""
        total = int(self.counts.sum())
        matrix = self.outgoing.factors[:total] // 2
        begin = (2 * (np.cumsum(self.counts) - self.counts))[matrix]
        first = begin + self.switch
        second = 2 * total + begin + self.counts[matrix] + self.switch
        chosen = np.concatenate((first, second))
        return element_index(self.touched.offsets[chosen], self.touched.lengths[chosen], device)

    @cached_property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """Per switching matrix: (matrix, start of V, start of U, vectors) in the packed ``touched``."""
        active = np.flatnonzero(self.counts)
        vectors = 2 * self.counts[active]
        first = np.cumsum(vectors) - vectors
        v_start = self.touched.offsets[first]
        u_start = self.touched.offsets[first + int(vectors.sum())]
        return list(zip(active.tolist(), v_start.tolist(), u_start.tolist(), vectors.tolist(), strict=True))

    def incoming(self, outgoing: torch.Tensor, fetched: torch.Tensor) -> torch.Tensor:
        """Packed new values in the order of ``outgoing``."""
        if not self.overflow:
            return fetched
        both = torch.cat((outgoing, fetched))
        factors = self.outgoing.factors
        spare = self.geometry.spare[factors // 2]
        order = np.arange(len(factors))
        inner = np.concatenate((self.switch, self.switch))
        fresh = inner < spare
        offsets = self.outgoing.offsets[np.where(fresh, order, order - spare)]
        offsets[fresh] = outgoing.numel() + self.fetched.offsets
        return both.index_select(0, element_index(offsets, self.outgoing.lengths, both.device))

    def stored(self, outgoing: torch.Tensor) -> tuple[VectorSet, torch.Tensor]:
        """What goes into the pool: slots and packed vectors."""
        if not self.overflow:
            return self.slots, outgoing
        matrix = self.outgoing.factors // 2
        inner = np.concatenate((self.switch, self.switch))
        kept = inner >= self.counts[matrix] - self.geometry.spare[matrix]
        slots = VectorSet(self.slots.factors[kept], self.slots.rows[kept], self.slots.lengths[kept])
        index = element_index(self.outgoing.offsets[kept], slots.lengths, outgoing.device)
        return slots, outgoing.index_select(0, index)


def make_plan(
    geometry: Geometry, counts: np.ndarray, switched: np.ndarray, order: list[np.ndarray] | None
) -> SwitchPlan:
    """Plan the switch of ``counts`` [matrices] vectors after ``switched`` earlier ones.

    ``order`` gives the slots of each matrix; None is the FIFO.
    """
    active = np.arange(len(counts))
    matrix, inner = _expand(active, counts)
    ranks, spare = geometry.ranks[matrix], np.maximum(geometry.spare[matrix], 1)
    base = switched[matrix] + inner
    rows_A, rows_B = base % ranks, (base + ranks // 2) % ranks
    if order is None:
        slot = base % spare
    else:
        slot = np.array([order[m][i % len(order[m])] for m, i in zip(matrix, inner, strict=True)], dtype=np.int64)
    both = np.concatenate((2 * matrix, 2 * matrix + 1))
    slots = geometry.vectors(both, np.concatenate((slot, slot)))
    fresh = np.concatenate((inner, inner)) < geometry.spare[both // 2]
    overflow = not bool(fresh.all())
    fetched = geometry.vectors(both[fresh], slots.rows[fresh]) if overflow else slots
    double, inside = _expand(active, 2 * counts)
    late = inside >= counts[double]
    position = switched[double] + np.where(late, inside - counts[double] + geometry.ranks[double] // 2, inside)
    position %= geometry.ranks[double]
    touched = geometry.vectors(np.concatenate((2 * double, 2 * double + 1)), np.concatenate((position, position)))
    return SwitchPlan(
        geometry=geometry,
        counts=counts,
        outgoing=geometry.vectors(both, np.concatenate((rows_A, rows_B))),
        slots=slots,
        fetched=fetched,
        counterparts=geometry.vectors(both, np.concatenate((rows_B, rows_A))),
        touched=touched,
        switch=inner,
        overflow=overflow,
    )


def arcs(stop: int, count: int, size: int) -> list[tuple[int, int]]:
    """The ``count`` positions before ``stop`` on a ring of ``size``, as one or two ranges."""
    if count == 0:
        return []
    start = stop - count
    if start >= 0:
        return [(start, stop)]
    return [(0, stop), (start + size, size)] if stop else [(start + size, size)]


def _expand(indices: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index i repeated counts[i] times, and the position of each among its equals."""
    repeated = np.repeat(indices, counts)
    return repeated, np.arange(len(repeated)) - np.repeat(counts.cumsum() - counts, counts)
