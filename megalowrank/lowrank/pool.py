"""Candidate vectors in host memory, one copy per data-parallel group.

Slot c of every pool lives on rank c mod dp. All pools of a model share one flat buffer per rank, so
that the vectors of one step, over all matrices, are one gather. Slots of the next step are known in
advance: ``prefetch`` starts their way to the device a whole step before ``take`` needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megalowrank.lowrank.vectors import VectorSet, element_index

HostAllocator = Callable[[int, torch.dtype], torch.Tensor]


@dataclass
class _Outgoing:
    """Vectors on their way to host memory: slots, element indices, values, and when they are there."""

    keys: np.ndarray
    here: torch.Tensor
    values: torch.Tensor
    event: torch.cuda.Event | None


class CandidatePools:
    """FIFO storage of all factors; pool f has ``slots[f]`` vectors of ``lengths[f]`` elements.

    ``allocate(numel, dtype)`` gives the buffer (pinned host memory from the engine, or device memory);
    ``device`` is where the vectors are used.
    """

    def __init__(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        rank: int,
        world: int,
        allocate: HostAllocator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.lengths = slots, lengths
        self.rank, self.world, self.device = rank, world, device
        self.local_slots = (slots - rank + world - 1) // world
        sizes = self.local_slots * lengths
        self.bases = np.cumsum(sizes) - sizes
        self.buffer = allocate(int(sizes.sum()), dtype)
        self._allocate = allocate
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[VectorSet, torch.Tensor] | None = None
        self._located: tuple[VectorSet, tuple[torch.Tensor, torch.Tensor | None]] | None = None
        self._outgoing: _Outgoing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return self.buffer.numel() * self.buffer.element_size()

    def local(self, factor: int) -> torch.Tensor:
        """This rank's slots rank, rank + world, … of one pool: a view [local slots, length], free to write."""
        self._settle()
        self._ahead = None
        count, length = int(self.local_slots[factor]), int(self.lengths[factor])
        return self.buffer.narrow(0, int(self.bases[factor]), count * length).view(count, length)

    def fill(self, factor: int, vectors: torch.Tensor) -> None:
        """Set a whole pool from [slots, length]; each rank keeps its own slots."""
        self.local(factor).copy_(vectors[self.rank :: self.world])

    def prefetch(self, wanted: VectorSet) -> None:
        """Start moving the vectors in slots ``wanted.rows`` of pools ``wanted.factors`` to the device."""
        if self._outgoing is not None and np.isin(self._keys(wanted), self._outgoing.keys).any():
            self._settle()
        self._ahead = (wanted, self._gather(wanted))

    def take(self, wanted: VectorSet) -> torch.Tensor:
        """Packed vectors of the slots, zeros where another rank owns them; on ``device``."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is wanted:
            packed = ahead[1]
        else:
            self._settle()
            packed = self._gather(wanted)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            packed.record_stream(torch.cuda.current_stream(self.device))
        return packed

    def put(self, where: VectorSet, packed: torch.Tensor) -> None:
        """Store packed vectors into slots; each rank keeps its own, asynchronously on an accelerator."""
        self._settle()
        here, there = self._locate(where)
        values = packed if there is None else packed.index_select(0, there.to(packed.device))
        values = values.to(self.buffer.dtype)
        event = None
        if self._stream is not None and self.buffer.device != values.device:
            staging = self._allocate(values.numel(), values.dtype)
            staging.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            values = staging
        self._outgoing = _Outgoing(self._keys(where), here, values, event)
        if event is None:
            self._settle()

    def _settle(self) -> None:
        """Finish the store that is on its way, if any."""
        if self._outgoing is None:
            return
        if self._outgoing.event is not None:
            self._outgoing.event.synchronize()
        self.buffer.index_copy_(0, self._outgoing.here, self._outgoing.values)
        self._outgoing = None

    def _gather(self, wanted: VectorSet) -> torch.Tensor:
        here, there = self._locate(wanted)
        values = self.buffer.index_select(0, here)
        if there is None and self._stream is None:
            return values
        staging = self._allocate(wanted.numel, self.buffer.dtype)
        if there is None:
            staging.copy_(values)
        else:
            staging.zero_().index_copy_(0, there, values)
        if self._stream is None or staging.device == self.device:
            return staging.to(self.device)
        with torch.cuda.stream(self._stream):
            return staging.to(self.device, non_blocking=True)

    def _keys(self, vectors: VectorSet) -> np.ndarray:
        return vectors.factors * (int(self.slots.max()) + 1) + vectors.rows

    def _locate(self, vectors: VectorSet) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Element indices in the buffer and in the packed values (None: all of them) of what this rank owns."""
        if self._located is not None and self._located[0] is vectors:
            return self._located[1]
        device = self.buffer.device
        if self.world == 1:
            starts = self.bases[vectors.factors] + vectors.rows * vectors.lengths
            found: tuple[torch.Tensor, torch.Tensor | None] = (element_index(starts, vectors.lengths, device), None)
        else:
            own = vectors.rows % self.world == self.rank
            lengths = vectors.lengths[own]
            starts = self.bases[vectors.factors[own]] + vectors.rows[own] // self.world * lengths
            there = element_index(vectors.offsets[own], lengths, device)
            found = (element_index(starts, lengths, device), there)
        self._located = (vectors, found)
        return found
