"""Ranks that hold the same notice one flipped bit, on all ranks, and name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.replica_cases import hashes
from tests.harness import run_ranks

BASE = {"method": "switchlora", "family": "llama"}
CASES: dict[str, dict[str, Any]] = {
    "norm over tensor ranks": {**BASE, "layout": "tp2", "tensor": "layers.1.pre_mlp_layernorm.weight", "bit": 0},
    "factor of a column linear": {**BASE, "layout": "tp2", "tensor": "layers.0.attention.k.A", "bit": 22},
    "factor of a row linear": {**BASE, "layout": "tp2 sp", "tensor": "layers.1.mlp.down.B", "bit": 31},
    "a moment": {**BASE, "layout": "tp2", "tensor": "layers.0.attention.o.B", "kind": "exp_avg_sq", "bit": 1},
    "a frozen weight over data ranks": {**BASE, "layout": "dp2", "tensor": "layers.1.mlp.gate.weight", "bit": 5},
    "a tied table over stages": {
        "method": "full", "family": "gpt2", "layout": "pp2", "tensor": "embedding.weight", "bit": 12,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    cases = [{"kind": "forward", **case} for case in CASES.values()]
    folder: Path = tmp_path_factory.mktemp("replicas")
    return run_ranks("tests.engine.replica_cases:run", 2, {"cases": cases}, folder, timeout=120)


@pytest.mark.parametrize("name", list(CASES))
def test_one_flipped_bit_stops_every_rank(name: str, reports: list[list[dict[str, Any]]]) -> None:
    number = list(CASES).index(name)
    for rank in reports:
        assert "replicas drifted apart: after update 10" in rank[number]["said"]
        assert CASES[name]["tensor"] in rank[number]["said"]
        assert rank[number]["due"] == [0, 5, 10]


@pytest.mark.parametrize("element", [0, 1, 998, 999])
def test_every_bit_counts(element: int) -> None:
    assert all(hashes({"element": element}))
