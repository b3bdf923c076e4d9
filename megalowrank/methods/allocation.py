"""Which modules get rank: the best of a ranking within a budget, alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalowrank.errors import ConfigError
from megalowrank.parallel.rng import generator

NEAR = 1e-5


@dataclass(frozen=True)
class Choice:
    """Which modules are on, by global index; ``tied`` of them by lot.

    ``margin`` is the smallest gap between a score that was taken and one that was not, as a share of the former; below
    NEAR another layout may round the other way. Infinite where everything was taken.
    """

    on: tuple[bool, ...]
    tied: int
    margin: float

    @property
    def near(self) -> bool:
        """Whether rounding could have decided: a gap that is small, but no tie."""
        return 0.0 < self.margin < NEAR


def allocate(scores: Sequence[float], shortcut: Sequence[bool], share: float, mode: str, key: tuple) -> Choice:
    """The best ⌊share · M⌋ of M matrices and round(share · N) of N shortcuts.

    ``mode``: off (there are no shortcuts), combined (one ranking for all) or separated (one for each kind). Those that
    tie at the threshold are drawn by ``key``, without touching any generator. A pure function of its arguments.
    """
    matrices = [i for i, is_shortcut in enumerate(shortcut) if not is_shortcut]
    others = [i for i, is_shortcut in enumerate(shortcut) if is_shortcut]
    counts = budgets(len(matrices), len(others), share)
    rankings = [(matrices, counts[0]), (others, counts[1])]
    if mode == "combined":
        rankings = [(matrices + others, sum(counts))]
    on, tied, margin = [False] * len(scores), 0, math.inf
    for number, (members, count) in enumerate(rankings):
        chosen, lots, gap = best([scores[i] for i in members], count, (*key, number))
        tied, margin = tied + lots, min(margin, gap)
        for position in chosen:
            on[members[position]] = True
    return Choice(tuple(on), tied, margin)


def budgets(matrices: int, shortcuts: int, share: float) -> tuple[int, int]:
    """How many matrices and shortcuts may be on; ConfigError if that is none."""
    counts = math.floor(share * matrices + 1e-9), round(share * shortcuts)
    if not sum(counts):
        allowed = f"at least 1 / {matrices}"
        raise ConfigError(f"--hetero-budget leaves none of {matrices} matrices on", share, allowed)
    return counts


def best(scores: Sequence[float], count: int, key: tuple) -> tuple[list[int], int, float]:
    """Positions of the ``count`` largest, how many of them were drawn among equals, and the gap to the rest."""
    if not 0 < count < len(scores):
        return list(range(len(scores)))[:count], 0, math.inf
    ordered = sorted(scores, reverse=True)
    threshold = ordered[count - 1]
    above = [i for i, score in enumerate(scores) if score > threshold]
    equal = [i for i, score in enumerate(scores) if score == threshold]
    left = count - len(above)
    if left < len(equal):
        order = torch.randperm(len(equal), generator=generator(*key)).tolist()
        return sorted(above + [equal[i] for i in order[:left]]), left, 0.0
    gap = (threshold - ordered[count]) / abs(threshold) if threshold else math.inf
    return sorted(above + equal), 0, gap
