"""The low-rank linears split over two and four ranks against the dense layer in one process, and their collectives."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.lowrank.linear_cases import BATCH, SEQUENCE

SHAPES = {
    "single": [["o", 8, 3]],
    "gate and up": [["gate", 5, 2], ["up", 5, 2]],
    "grouped query": [["q", 6, 4], ["k", 2, 1], ["v", 3, 5]],
}
"""Rows and rank of every matrix. Of both, most do not divide by two or by four ranks."""
IN, TOKENS, BYTES = 7, SEQUENCE * BATCH, 8


def adapted_cases() -> list[dict[str, Any]]:
    grid = product(("column", "row"), (False, True), (False, True), SHAPES, (False, True))
    found = [
        {"kind": kind, "sequence": sequence, "ride": ride, "blocks": SHAPES[shape], "columns": IN, "bias": bias}
        for kind, sequence, ride, shape, bias in grid
    ]
    first = [{**case, "input_gradient": False} for case in found if case["blocks"] == SHAPES["gate and up"]]
    return found + first


def plain_cases() -> list[dict[str, Any]]:
    grid = product(("column", "row"), (False, True), SHAPES, (False, True), (False, True))
    return [
        {"kind": kind, "sequence": sequence, "blocks": [[name, rows, 0] for name, rows, _ in SHAPES[shape]],
         "columns": IN, "bias": bias, "frozen": frozen}
        for kind, sequence, shape, bias, frozen in grid
    ]  # fmt: skip


def rounding_cases() -> list[dict[str, Any]]:
    blocks = [["q", 64, 8], ["k", 16, 8], ["v", 16, 8]]
    return [
        {"kind": kind, "sequence": sequence, "ride": ride, "blocks": blocks, "columns": 64, "bias": True}
        for kind, sequence, ride in product(("column", "row"), (False, True), (False, True))
    ]


CORE = [{"kind": kind, "blocks": [["o", 12, 0]], "columns": 8} for kind in ("column", "row")]
CASES = {
    "compare": adapted_cases() + plain_cases(),
    "core": CORE,
    "rounding": rounding_cases(),
    "recomputed": [{"sequence": s, "ride": r, "bias": b} for s, r, b in product((False, True), repeat=3)],
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Reports of all ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("linears")
    return {world: run_ranks("tests.lowrank.linear_cases:everything", world, CASES, folder) for world in (2, 4)}


def by_case(reports: dict[int, list[Any]], world: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    ranks = [report["compare"] for report in reports[world]]
    return [(case, list(found)) for case, found in zip(CASES["compare"], zip(*ranks, strict=True), strict=True)]


@pytest.mark.parametrize("world", [2, 4])
def test_split_layers_equal_the_dense_one(reports: dict[int, list[Any]], world: int) -> None:
    """Output and every gradient, partial ones summed over ranks; and both schedules each other."""
    for case, ranks in by_case(reports, world):
        names = {"y"} | ({"x"} if case.get("input_gradient", True) else set()) | ({"bias"} if case["bias"] else set())
        for name, _, rank in case["blocks"]:
            names |= {f"A_{name}", f"B_{name}"} if rank else set()
        if not case["blocks"][0][2] and not case["frozen"]:
            names.add("weight")
        for report in ranks:
            assert report["worst"].keys() == names, case
            assert max(report["worst"].values()) <= 1e-12, (case, report["worst"])
            assert report.get("schedules", 0.0) <= 1e-12, case


@pytest.mark.parametrize("world", [2, 4])
def test_padding_stays_zero(reports: dict[int, list[Any]], world: int) -> None:
    """Elements of outputs and gradients that belong to no logical tensor are zero, exactly."""
    padded = 0
    for case, ranks in by_case(reports, world):
        assert [report["padding"] for report in ranks] == [0.0] * world, case
        padded += sum(report["padded"] for report in ranks)
    assert padded > 1000


@pytest.mark.parametrize("world", [2, 4])
def test_folds_of_a_part_are_parts_of_the_fold(reports: dict[int, list[Any]], world: int) -> None:
    """W += s · uᵀ v block by block, without communication, and zero where it is padding."""
    for case, ranks in by_case(reports, world):
        assert all(report.get("folded", 0.0) <= 1e-12 for report in ranks), case
        assert all(("folded" in report) == bool(case["blocks"][0][2]) for report in ranks)


@pytest.mark.parametrize("world", [2, 4])
def test_marks_and_attributes(reports: dict[int, list[Any]], world: int) -> None:
    for case, ranks in by_case(reports, world):
        column, matrices = case["kind"] == "column", [name for name, _, rank in case["blocks"] if rank]
        replicated, divided = ("A", "B") if column else ("B", "A")
        partial = ["bias"] if case["bias"] and case["sequence"] and not column else []
        if case["sequence"] or not case.get("ride", True):
            partial += [f"{replicated}_{name}" for name in matrices]
        split = {"weight": 0 if column else 1} | ({"bias": 0} if column and case["bias"] else {})
        split |= {f"{divided}_{name}": 1 for name in matrices}
        for report in ranks:
            assert report["partial"] == partial, case
            assert report["split"] == split, case


def predicted(case: dict[str, Any]) -> list[dict[str, list[int]]]:
    """[calls, bytes] by collective of the forward and the backward pass."""
    column, sequence = case["kind"] == "column", case["sequence"]
    columns, rows = case["columns"], sum(rows for _, rows, _ in case["blocks"])
    width, narrow = columns if column else rows, sum(rank for _, _, rank in case["blocks"]) * case.get("ride", True)
    volume = [1, TOKENS * (width + narrow) * BYTES]
    gather, scatter, reduce = ({name: volume} for name in ("all-gather", "reduce-scatter", "all-reduce"))
    if not column:
        return [scatter, gather] if sequence else [reduce, {}]
    backward = scatter if sequence else reduce
    if not case.get("input_gradient", True):
        backward = {name: [1, TOKENS * narrow * BYTES] for name in backward} if narrow else {}
    if sequence and not case.get("frozen", True):
        backward = backward | gather
    return [gather if sequence else {}, backward]


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_are_those_of_the_plain_layer(reports: dict[int, list[Any]], world: int) -> None:
    """As many per direction as without factors, of the predicted volume, on every rank."""
    base = {}
    for case, ranks in by_case(reports, world):
        for report in ranks:
            assert report["traffic"] == predicted(case), case
        if case.get("frozen"):
            base[case["kind"], case["sequence"]] = ranks[0]["traffic"]
    for case, ranks in by_case(reports, world):
        if case["blocks"][0][2] and case.get("input_gradient", True):
            assert calls(ranks[0]["traffic"]) == calls(base[case["kind"], case["sequence"]]), case


@pytest.mark.parametrize("world", [2, 4])
def test_the_plain_layer_communicates_as_megatron_core(reports: dict[int, list[Any]], world: int) -> None:
    for report in reports[world]:
        for case, found in zip(CORE, report["core"], strict=True):
            assert found == predicted({**case, "sequence": False})


def calls(traffic: list[dict[str, list[int]]]) -> list[dict[str, int]]:
    return [{name: found[0] for name, found in way.items()} for way in traffic]


@pytest.mark.parametrize("world", [2, 4])
def test_bfloat16_is_as_near_as_one_process(reports: dict[int, list[Any]], world: int) -> None:
    """Errors are a few thousandths in both: one more rounding per collective, no drift."""
    for report in reports[world]:
        for case, found in zip(CASES["rounding"], report["rounding"], strict=True):
            for name, (own, alone) in found.items():
                assert 0 < own < 8e-3 and own < 2 * alone + 1e-3, (case, name, own, alone)


@pytest.mark.parametrize("world", [2, 4])
def test_activation_checkpointing_changes_nothing(reports: dict[int, list[Any]], world: int) -> None:
    for report in reports[world]:
        for found in report["recomputed"]:
            assert all(found["equal"]) and len(found["equal"]) >= 6 and found["moved"] > 0.01
