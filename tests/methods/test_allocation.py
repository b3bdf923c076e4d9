"""Who gets rank: against a brute-force reading of the rule."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from megalowrank.errors import ConfigError
from megalowrank.methods.allocation import allocate, best, budgets

KEY = ("seed", 3)


@pytest.mark.parametrize("seed", range(30))
def test_the_best_are_chosen_and_ties_are_drawn_among_equals(seed: int) -> None:
    source = random.Random(seed)
    scores = [source.choice((0.0, 0.5, 1.0, source.random())) for _ in range(source.randint(2, 12))]
    count = source.randint(1, len(scores) - 1)
    chosen, tied, gap = best(scores, count, (*KEY, seed))
    values = sorted((scores[i] for i in chosen), reverse=True)
    assert values == sorted(scores, reverse=True)[:count] and len(set(chosen)) == count
    left = [score for i, score in enumerate(scores) if i not in chosen]
    assert (gap == 0.0) == (max(left) == values[-1]) == (tied > 0)
    if tied == 0 and values[-1]:
        assert gap == pytest.approx((values[-1] - max(left)) / values[-1])
    assert best(scores, count, (*KEY, seed)) == (chosen, tied, gap)


def test_equal_scores_are_chosen_evenly_over_seeds() -> None:
    """CONSTANT is a fair lot."""
    drawn = Counter(i for seed in range(2000) for i in best([1.0] * 8, 2, ("lot", seed))[0])
    assert len(drawn) == 8 and all(abs(count - 500) < 5 * math.sqrt(500 * 0.75) for count in drawn.values())


def test_budgets_are_those_of_the_whole_model() -> None:
    """⌊p·M⌋ matrices, round(p·N) shortcuts; 0.3 · 10 is 3, whatever its binary fraction says."""
    assert budgets(14, 0, 0.25) == (3, 0) and budgets(14, 11, 0.25) == (3, 3) and budgets(10, 0, 0.3) == (3, 0)
    with pytest.raises(ConfigError, match="--hetero-budget leaves none of 3 matrices on"):
        budgets(3, 0, 0.25)


def test_shortcuts_compete_with_matrices_or_among_themselves() -> None:
    scores = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]
    shortcut = [False] * 4 + [True] * 4
    assert allocate(scores, shortcut, 0.5, "combined", KEY).on == (True,) * 4 + (False,) * 4
    apart = allocate(scores, shortcut, 0.5, "separated", KEY)
    assert apart.on == (True, True, False, False, False, False, True, True)
    assert apart.margin == pytest.approx(1 / 8) and not apart.near and apart.tied == 0
    close = allocate([1.0, 1.0 - 1e-7], [False, False], 0.5, "off", KEY)
    assert close.near and close.on == (True, False)
