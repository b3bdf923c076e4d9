"""The project's collectives on three gloo ranks, in a group of two of them, and without any group."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.parallel.collective_cases import PAIR, TEXTS

MEMBERS = {"world": (0, 1, 2), "pair": PAIR, "alone": (0,)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.parallel.collective_cases:answers", 3, {}, tmp_path_factory.mktemp("collectives"), 120)


def by_group(answers: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The answers of every member of a group; ``alone`` is each rank by itself."""
    found = [rank[name] for rank in answers if name in rank]
    assert len(found) == (3 if name == "alone" else len(MEMBERS[name]))
    return found


@pytest.mark.parametrize("name", MEMBERS)
def test_sum_and_mean(answers: list[dict[str, Any]], name: str) -> None:
    members = MEMBERS[name]
    for found in by_group(answers, name):
        assert found["size"] == len(members) and found["in place"] is True
        assert found["mean"] == [sum(members) / len(members) + 0.5, -sum(members) / len(members)]
        assert found["sum"] == [sum(members), len(members) * 2**40 + sum(members)]


@pytest.mark.parametrize("name", MEMBERS)
def test_all_true(answers: list[dict[str, Any]], name: str) -> None:
    for found in by_group(answers, name):
        assert found["all yes"] is True
        assert found["one no"] == [no not in MEMBERS[name] for no in range(3)]


@pytest.mark.parametrize("name", MEMBERS)
def test_text_of_the_first_rank_is_on_all(answers: list[dict[str, Any]], name: str) -> None:
    for found in by_group(answers, name):
        assert found["texts"] == [True] * len(TEXTS)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_error_of_the_first_rank_is_raised_on_all(answers: list[dict[str, Any]], name: str) -> None:
    for found in by_group(answers, name):
        assert found["error"] == "--load is damaged ☃; got 0; allowed: another"
        assert found["after"] == "still in step"
