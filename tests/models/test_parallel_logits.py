"""Our models on two tensor-parallel ranks against transformers': logits, loss, gradients and their norm."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks

FAMILIES, METHODS = ("llama", "gpt2", "neox"), ("full", "lora", "switchlora", "relora", "golore")
# largest difference of logits, and of gradients relative to the norm of all
BOUNDS = {"float32": (1e-4, 1e-5), "float64": (1e-7, 1e-9)}
CASES = [
    {"family": family, "method": method, "dtype": dtype, "sequence": sequence, "schedule": "ride"}
    for family in FAMILIES for method in METHODS for dtype in BOUNDS for sequence in (False, True)
] + [
    {"family": family, "method": "lora", "dtype": "float64", "sequence": sequence, "schedule": "partial"}
    for family in FAMILIES for sequence in (False, True)
] + [
    {"family": "opt", "method": "switchlora", "dtype": dtype, "sequence": sequence, "schedule": "ride"}
    for dtype in BOUNDS for sequence in (False, True)
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every rank found, by case."""
    ranks = run_ranks("tests.models.logit_cases:compare", 2, CASES, tmp_path_factory.mktemp("logits"))
    return {name_of(case): list(both) for case, *both in zip(CASES, *ranks, strict=True)}


def name_of(case: dict[str, Any]) -> str:
    parts = [case["family"], case["method"], case["dtype"], case["schedule"], "sp" * case["sequence"]]
    return " ".join(part for part in parts if part)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_ranks_compute_what_transformers_does(case: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> None:
    bound, relative = BOUNDS[case["dtype"]]
    for report in found[name_of(case)]:
        assert report["spread"] > 0.5, "there must be something to compare"
        assert report["logits"] <= bound
        assert report["loss"] <= bound / 10
        assert report["gradient"] <= relative
        assert report["norm"] <= relative
    first, last = found[name_of(case)]
    assert first["padded"] == 0 and last["padded"] > 0, "widths that do not divide"
    assert (first["partial"] > 0) is (case["sequence"] or case["schedule"] == "partial")
