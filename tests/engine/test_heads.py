"""Heads on ranks: what H independent workers learn, whatever is inside a head; and resuming them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.methods.lte_merge import merge_bytes
from megalowrank.parallel.groups import initialize_single_process
from tests.engine import head_cases
from tests.harness import run_ranks

CASES = "tests.engine.head_cases"
TWO: list[dict[str, Any]] = [
    *({"layout": {"stage": stage}} for stage in range(4)),
    {"layout": {"stage": 1}, "clip": 0.3},
    {"layout": {"stage": 2}, "bf16": True},
    {"layout": {"stage": 1}, "flags": {"lte_merge_interval": 1}},
    *({"layout": {"stage": stage}, "flags": {"lora_rank": 4}} for stage in (1, 3)),
    {"layout": {"stage": 2}, "flags": {"lora_rank": 6}, "bf16": True},
    *({"layout": {"stage": stage}, "flags": {"lte_plain": "averaged"}} for stage in range(4)),
    *({"layout": {"stage": stage}, "flags": {"lte_plain": "synchronous"}} for stage in range(4)),
]
FOUR: list[dict[str, Any]] = [
    *({"layout": {"dp": 2, "stage": stage}} for stage in range(4)),
    *({"layout": {"tp": 2, "stage": stage}} for stage in range(4)),
    {"layout": {"tp": 2, "sp": True, "stage": 1}},
    {"layout": {"pp": 2, "stage": 1}},
    {"layout": {"dp": 2, "stage": 2}, "flags": {"lte_plain": "averaged"}, "clip": 0.3},
    {"layout": {"tp": 2, "sp": True, "stage": 1}, "flags": {"lte_plain": "averaged"}},
    {"layout": {"dp": 2, "stage": 3}, "flags": {"lora_rank": 6}},
    {"layout": {"tp": 2, "stage": 1}, "flags": {"lora_rank": 4}},
    {"layout": {"dp": 2, "stage": 3}, "flags": {"lte_plain": "synchronous"}},
    {"layout": {"tp": 2, "stage": 2}, "flags": {"lte_plain": "synchronous"}},
    {"layout": {"pp": 2, "stage": 1}, "flags": {"lte_plain": "synchronous"}},
]
RESUMED: list[dict[str, Any]] = [
    {"layout": {"dp": 2, "stage": 1}, "cuts": [3]},
    {"layout": {"dp": 2, "stage": 3}, "cuts": [1, 4], "bf16": True},
    {"layout": {"pp": 2, "stage": 1}, "cuts": [5]},
    {"layout": {"tp": 2, "stage": 2}, "cuts": [2, 3]},
    {"layout": {"dp": 2, "stage": 1}, "cuts": [3], "flags": {"lte_reset": True}},
    {"layout": {"dp": 2, "stage": 2}, "cuts": [3], "flags": {"lte_plain": "averaged"}},
]
ALWAYS = [*TWO[:8], *TWO[9::3], *FOUR[1:8:2], *FOUR[8:12], *FOUR[13::2]]
SHAPES = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "gate": (21, 16), "up": (21, 16), "down": (16, 21)}


def name_of(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for part in (case["layout"], {k: v for k, v in case.items() if k != "layout"})
                     for key, value in part.items())  # fmt: skip


def runs(
    factory: pytest.TempPathFactory, function: str, world: int, cases: list[dict[str, Any]]
) -> dict[str, list[Any]]:
    """Of every case what all ranks say, in two heads."""
    folder = factory.mktemp(function)
    payload = {"heads": 2, "cases": cases, "folder": str(folder)}
    found = run_ranks(f"{CASES}:{function}", world, payload, folder)
    return {name_of(case): [rank[number] for rank in found] for number, case in enumerate(cases)}


def cells(cases: list[dict[str, Any]]) -> list[Any]:
    """Parameters of a test; what does not always run is for ``--every-cell``."""
    marks = {True: (), False: pytest.mark.every_cell}
    return [pytest.param(case, id=name_of(case), marks=marks[case in ALWAYS]) for case in cases]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, every_cell: bool) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world, cases in ((2, TWO), (4, FOUR)):
        found |= runs(tmp_path_factory, "compare", world, [case for case in cases if every_cell or case in ALWAYS])
    return found


@pytest.mark.parametrize("case", cells([*TWO, *FOUR]))
def test_heads_learn_what_independent_workers_learn(case: dict[str, Any], compared: dict[str, list[Any]]) -> None:
    found = compared[name_of(case)]
    losses, evaluated = found[0]["expected"]
    close = 2e-4 if case.get("bf16") else 1e-6
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, abs=close)
        assert rank["evaluations"][0] == pytest.approx(evaluated, abs=close), "W with the mean of all heads"
    bounds = {"clock": 0.0, "exp_avg": 1e-3, "exp_avg_sq": 1e-5, "fixed": 6e-3, "master": 3e-3, "weight": 3e-3}
    for kind, worst in found[0]["worst"].items():
        assert worst <= (bounds[kind] if case.get("bf16") else 5e-7), kind


@pytest.mark.parametrize("case", cells([*TWO, *FOUR]))
def test_an_evaluation_leaves_no_trace(case: dict[str, Any], compared: dict[str, list[Any]]) -> None:
    for rank in compared[name_of(case)]:
        assert rank["untouched"] and rank["evaluations"][0] == rank["evaluations"][1]


@pytest.mark.parametrize("case", cells([*TWO, *FOUR]))
def test_one_flipped_bit_of_a_shared_weight_is_found(case: dict[str, Any], compared: dict[str, list[Any]]) -> None:
    found = compared[name_of(case)]
    block = 1 if case["layout"].get("pp") else 0
    assert f"layers.{block}.attention.q.weight differs" in found[-1]["flipped"]
    assert all("replicas drifted apart" in rank["flipped"] for rank in found)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return runs(tmp_path_factory, "resume", 4, RESUMED)


@pytest.mark.parametrize("case", RESUMED, ids=name_of)
def test_a_run_goes_on_in_the_middle_of_an_interval_bit_by_bit(
    case: dict[str, Any], resumed: dict[str, list[Any]]
) -> None:
    found = resumed[name_of(case)]
    assert all(rank["same"] for rank in found)
    skipped = [rank["attempts"] for rank in found]
    assert skipped == [0, 0, 1, 1], "heads may have skipped different numbers of batches"


@pytest.fixture(scope="module")
def regrouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any], Path, Path]:
    """A run of two heads, and one of four that starts from its checkpoint."""
    folder = tmp_path_factory.mktemp("regrouped")
    found = []
    for heads, payload in ((2, {"save": "two"}), (4, {"save": "four", "load": "two"})):
        named = {key: str(folder / value) for key, value in payload.items()}
        (folder / f"of{heads}").mkdir()
        payload = {"heads": heads, "folder": str(folder / f"of{heads}"), **named}
        found.append(run_ranks(f"{CASES}:other_number", heads, payload, folder))
    return found[0], found[1], folder / "two", folder / "four"


def test_another_number_of_heads_starts_from_the_mean(regrouped: tuple[list[Any], list[Any], Path, Path]) -> None:
    two, four, _, _ = regrouped
    for rank in four:
        assert rank["evaluated"] == pytest.approx(two[0]["evaluated"], abs=1e-6)
        assert rank["updates"] == 0, "the optimizer begins anew"


def test_weights_of_a_checkpoint_are_those_of_all_heads(
    regrouped: tuple[list[Any], list[Any], Path, Path], tmp_path: Path
) -> None:
    """A model without factors has the loss that the heads' evaluation had."""
    two, _, saved, _ = regrouped
    initialize_single_process(str(tmp_path / "store"))
    model = head_cases.plain_model(SavedWeights.open(saved))
    assert head_cases.loss_of(model) == pytest.approx(two[0]["evaluated"], abs=1e-6)


def test_a_head_that_skips_alone_what_is_trained_alike_ends_the_run(tmp_path: Path) -> None:
    found = run_ranks(f"{CASES}:skip_alone", 2, {"heads": 2, "folder": str(tmp_path)}, tmp_path)
    said = "head 1 alone skipped an update, which --lte-plain synchronous cannot go on from"
    assert found == [f"True {said}", f"False {said}"]


@pytest.mark.parametrize("case", [TWO[0], TWO[5], TWO[7], FOUR[5]], ids=name_of)
def test_the_bytes_of_a_merge_are_those_planned(case: dict[str, Any], compared: dict[str, list[Any]]) -> None:
    """Every matrix in the cheaper way; W, A and Bᵀ of the last MLP product are divided by tensor-parallel ranks."""
    rank, tensor = case.get("flags", {}).get("lora_rank", 3), case["layout"].get("tp", 1)
    size = 2 if case.get("bf16") else 4
    expected = 0.0
    for name, (out, into) in SHAPES.items():
        rows, columns = (out, -(-into // tensor)) if name in ("o", "down") else (-(-out // tensor), into)
        expected += 2 * min(merge_bytes(2 * rank, rows, columns, 2, size))
    assert compared[name_of(case)][0]["counters"]["merge_bytes"] == pytest.approx(3 * expected, rel=0.02)
