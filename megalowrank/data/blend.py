"""Blends: several data sets in fixed proportions, each in its own order, without a stored sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megalowrank.data.sampler import BatchSampler, GlobalBatches
from megalowrank.errors import ConfigError

PERIOD = 10_000


def parse_blend(words: Sequence[str], flag: str) -> list[tuple[float, str]]:
    """(share, prefix) of every data set; the shares add up to 1.

    ``words`` is one prefix, or weights and prefixes in turn, as in Megatron; ``flag`` is named in errors.
    ConfigError for anything else, and for weights that are not above 0 or too small to be drawn.
    """
    allowed = "one prefix, or WEIGHT PREFIX WEIGHT PREFIX ..."
    if len(words) == 1:
        return [(1.0, str(words[0]))]
    if not words or len(words) % 2:
        raise ConfigError(f"{flag} is malformed", f"{len(words)} words", allowed)
    weights = []
    for word in words[::2]:
        try:
            weights.append(float(word))
        except ValueError:
            raise ConfigError(f"{flag} is malformed", f"{str(word)!r} where a weight should be", allowed) from None
        if not 0.0 < weights[-1] < math.inf:
            raise ConfigError(f"{flag} has a weight out of range", word, "> 0, finite")
    shares = [weight / sum(weights) for weight in weights]
    if min(whole_shares(shares)) < 1:
        raise ConfigError(f"{flag} has a weight too small", min(weights), f">= 1/{PERIOD} of all weights together")
    return list(zip(shares, map(str, words[1::2]), strict=True))


def whole_shares(shares: Sequence[float]) -> list[int]:
    """``shares`` as whole numbers that add up to PERIOD, those with the largest remainders rounded up."""
    exact = [share * PERIOD for share in shares]
    whole = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(exact)), key=lambda number: whole[number] - exact[number])
    for number in order[: PERIOD - sum(whole)]:
        whole[number] += 1
    return whole


def interleave(counts: Sequence[int]) -> np.ndarray:
    """PERIOD numbers of data sets in which number k occurs counts[k] times, as evenly as can be.

    At every place stands the one furthest behind its share.
    """
    shares, taken = np.array(counts, dtype=np.int64), np.zeros(len(counts), dtype=np.int64)
    table = np.empty(PERIOD, dtype=np.int64)
    for place in range(PERIOD):
        chosen = int(np.argmax(shares * (place + 1) - PERIOD * taken))
        taken[chosen] += 1
        table[place] = chosen
    return table


class BlendedSampler(GlobalBatches):
    """Samples of several parts in proportion to ``shares``.

    Position g belongs to part table[g % PERIOD]; within the part it is position (g // PERIOD) * count + rank,
    where count is how often the table names the part and rank how often before that place. So every part is
    gone through in its own order, none skipped, and where a stream stands is known from g alone.
    """

    def __init__(self, parts: Sequence[BatchSampler], shares: Sequence[float], global_batch_size: int) -> None:
        super().__init__(parts[0].seq_length, global_batch_size)
        self.parts = parts
        self.counts = np.array(whole_shares(shares), dtype=np.int64)
        self._table = interleave(self.counts.tolist())
        self._places = [np.flatnonzero(self._table == number) for number in range(len(parts))]
        self._ranks = np.empty(PERIOD, dtype=np.int64)
        for places in self._places:
            self._ranks[places] = np.arange(len(places))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the part, and position within it, of positions [n] of the blend."""
        cycles, places = np.divmod(positions.astype(np.int64), PERIOD)
        numbers = self._table[places]
        return numbers, cycles * self.counts[numbers] + self._ranks[places]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of the stream: int64 [n] to int64 [n, seq_length + 1]."""
        numbers, inner = self.locate(positions)
        found = np.empty((len(positions), self.seq_length + 1), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            found[chosen] = self.parts[number].rows(inner[chosen])
        return found

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches before the first part repeats a sample; 1, with repeats, if there are fewer."""
        first_repeats = []
        for part, count, places in zip(self.parts, self.counts.tolist(), self._places, strict=True):
            cycles, rank = divmod(len(part.window), count)
            first_repeats.append(cycles * PERIOD + int(places[rank]))
        return max(1, min(first_repeats) // self.global_batch_size)
