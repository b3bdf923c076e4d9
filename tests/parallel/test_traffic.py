"""Collectives are counted by group, exactly those that happen while it is active."""

from __future__ import annotations

from pathlib import Path

from tests.harness import run_ranks


def test_known_collectives(tmp_path: Path) -> None:
    expected = {
        "world: all-reduce": [2, 4 * 10 + 4 * 5],
        "world: all-gather": [2, 4 * 10 * 3 * (1 + 2)],
        "world: broadcast": [1, 8 * 10],
    }
    first, second, third = run_ranks("tests.parallel.traffic_cases:count", 3, None, tmp_path)
    assert first == second == {**expected, "pair: all-reduce": [1, 2 * 3]}
    assert third == expected
