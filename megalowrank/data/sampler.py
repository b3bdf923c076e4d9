"""The order of samples: a pure function of (seed, step), the same for any number of ranks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch

from megalowrank.data.tokens import TokenWindow
from megalowrank.errors import ConfigError

_ROUNDS = 8


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the keyed permutation of range(n) sends each ``index``; int64, of the same shape.

    A Feistel network permutes the numbers of 2h bits, 4**h >= n; results outside range(n) are sent
    through again until they are inside (cycle walking), which leaves a permutation of range(n).
    Nothing is stored. ValueError unless every index is in range(n).
    """
    if index.size and not 0 <= index.min() <= index.max() < n:
        raise ValueError(f"index outside range({n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [key_of("round", key, number) for number in range(_ROUNDS)]
    values = _feistel(index.astype(np.uint64).ravel(), half_bits, round_keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(index.shape)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit hash of each value (multiply and xor-shift, modulo 2**64)."""
    mixed = values ^ np.uint64(key)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 31), (0x94D049BB133111EB, 29)):
        mixed = mixed * np.uint64(multiplier)
        mixed = mixed ^ (mixed >> np.uint64(shift))
    return mixed


def key_of(purpose: str, *numbers: int) -> int:
    """64 bits that depend on all arguments, alike on every platform."""
    text = "/".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def epoch_order(positions: np.ndarray, length: int, seed: int | None) -> np.ndarray:
    """Which of ``length`` samples is at each position [n] of an endless stream of passes; int64 [n].

    Every pass has its own order, drawn from (seed, pass); without a seed all are in order.
    """
    epochs, places = np.divmod(positions.astype(np.int64), length)
    if seed is None:
        return places
    indices = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        indices[chosen] = permute(places[chosen], length, key_of("epoch", seed, epoch))
    return indices


class GlobalBatches(ABC):
    """An endless stream of samples, cut into global batches that any number of ranks shares out alike.

    ``global_batch_size`` samples of ``seq_length`` + 1 tokens are one update.
    """

    def __init__(self, seq_length: int, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise ConfigError("--global-batch-size is out of range", global_batch_size, ">= 1")
        self.seq_length, self.global_batch_size = seq_length, global_batch_size

    @abstractmethod
    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of the stream: int64 [n] to int64 [n, seq_length + 1]."""

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """Whole global batches without a repeated sample; 1, with repeats, if there are fewer samples."""

    def micro_batch(self, step: int, index: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> torch.Tensor:
        """Micro-batch ``index`` of rank ``dp_rank`` in update ``step``.

        An int64 tensor [micro_batch_size, seq_length + 1].
        Row i is position (index * dp_size + dp_rank) * micro_batch_size + i of the global batch, so any
        number of ranks shares out the same batch. ValueError for positions outside the global batch.
        """
        first = (index * dp_size + dp_rank) * micro_batch_size
        if not 0 <= first < first + micro_batch_size <= self.global_batch_size or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"micro-batch {index} of rank {dp_rank} of {dp_size} is outside the global batch of "
                f"{self.global_batch_size} samples"
            )
        start = step * self.global_batch_size + first
        return torch.from_numpy(self.rows(np.arange(start, start + micro_batch_size)))


class BatchSampler(GlobalBatches):
    """The samples of one window.

    Position g is sample g modulo len(window) of pass g // len(window); with ``shuffle`` each pass has its
    own order, drawn from (seed, pass). ConfigError if the window has no sample.
    """

    def __init__(self, window: TokenWindow, seed: int, global_batch_size: int, shuffle: bool = True) -> None:
        if not len(window):
            raise ConfigError("the data are too short for one sample", None, f"> {window.seq_length} tokens")
        super().__init__(window.seq_length, global_batch_size)
        self.window, self.seed, self.shuffle = window, seed, shuffle

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches without a repeated sample; 1, with repeats, if the window is smaller."""
        return max(1, len(self.window) // self.global_batch_size)

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """The sample of the window at each position [n] of the stream; int64 [n]."""
        return epoch_order(positions, len(self.window), self.seed if self.shuffle else None)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of the stream: int64 [n] to int64 [n, seq_length + 1]."""
        return np.stack([self.window.sample(index) for index in self.sample_indices(positions).tolist()])
