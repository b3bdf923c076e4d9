"""Switching costs at most one collective per step for all layers, and one copy of the pool per group of ranks."""

from __future__ import annotations

from pathlib import Path

from tests.harness import run_ranks


def test_one_collective_and_one_pool_copy(tmp_path: Path) -> None:
    ranks = run_ranks("tests.methods.traffic_cases:collectives_of_switching", 2, [0, 2, 3], tmp_path)
    for stage in range(3):
        for rank in ranks:
            calls = rank[stage]["calls"]
            assert rank[stage]["moved"]["switched_vectors"] > 0
            assert all(len(call) <= 1 for call in calls)
            assert any(call for call in calls)
        assert sum(rank[stage]["own"] for rank in ranks) == ranks[0][stage]["whole"]
