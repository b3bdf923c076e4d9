"""Sharded, offloaded and accumulated training is dense training: ZeRO 0 to 3 against one plain process.

On one and on two ranks every sum has at most two terms or a known order, which the dense reference follows
(``equality_cases.groups_of``), so masters, moments, forward copies, W with its residual, pools, clocks and
losses are compared bit by bit. On four ranks gloo adds in an order of its own, and with clipping the norm is
summed partition by partition: there the comparison has a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.methods import METHODS as REGISTRY
from tests.engine.equality_cases import LR, METHODS, STEPS, Run, difference
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(900)

Report = tuple[dict[str, Any], list[dict[str, Any]]]
CPU = {"device": "cpu"}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"stage": stage} for stage in range(4)},
    **{f"zero{stage} offload": {"stage": stage, "zero": {"offload_optimizer": CPU}} for stage in (1, 2, 3)},
    "zero3 small": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0, "sub_group_size": 40}},
    "zero3 all offload": {"stage": 3, "zero": {
        "offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0, "sub_group_size": 40,
    }},
}  # fmt: skip
OVERFLOW = {"lora_rank": 10, "switch_interval": 2, "switch_freeze_steps": 1, "lora_target": ["o", "gate", "up", "down"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "fifo": {"method": "switchlora"},
    "random": {"method": "switchlora", "flags": {"switch_order": "random"}},
    "overflow": {"method": "switchlora", "flags": OVERFLOW},
    "overflow random": {"method": "switchlora", "flags": {**OVERFLOW, "switch_order": "random"}},
    "freeze 0": {"method": "switchlora", "flags": {"switch_freeze_steps": 0, "switch_interval": 2}},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "merge": {"method": "relora"},
    "merge, both masks": {"method": "relora", "flags": {"relora_masks": "independent", "relora_prune_ratio": 0.5}},
    "merge, zero": {"method": "relora", "flags": {
        "relora_reset": "zero", "relora_prune_ratio": None, "relora_interval": 3,
    }},
    "merge, random": {"method": "relora", "flags": {"relora_reset": "random", "relora_restart_clock": True}},
    "merge, drawn B": {"method": "relora", "flags": {
        "lora_init": "switchlora", "relora_reset": "none", "relora_prune_ratio": None,
    }},
}  # fmt: skip
NEW = {name: {"method": name} for name in REGISTRY if {"method": name} not in VARIANTS.values()}
VARIANTS.update(NEW)
EVERYWHERE = ("fifo", "merge")


SMALL_SET = ("zero0", "zero1", "zero2", "zero3", "zero3 all offload")


def case(variant: str, layout: str, **more: Any) -> dict[str, Any]:
    return {"name": f"{variant}, {layout}", "variant": variant, **VARIANTS[variant], **LAYOUTS[layout], **more}


def exact_cases(layouts: Iterable[str], every_cell: bool) -> list[dict[str, Any]]:
    """FIFO and merges under every layout, the other variants and methods under every fourth layout in turns.

    Precision and accumulation alternate; with ``every_cell`` FIFO and merges have every precision, FIFO every
    accumulation too.
    """
    found = []
    for at, layout in enumerate(layouts):
        found += [
            case("fifo", layout, bf16=bf16, micro=micro)
            for bf16 in (False, True) for micro in (1, 2) if every_cell or (bf16 + micro + at) % 2
        ]  # fmt: skip
        found += [
            case(variant, layout, bf16=bf16, micro=1 + (bf16 + at) % 2)
            for variant in EVERYWHERE[1:] for bf16 in (False, True) if every_cell or bf16 == at % 2
        ]  # fmt: skip
        for v, variant in enumerate(VARIANTS):
            if variant not in EVERYWHERE and (v + at) % 4 == 0:
                turn = (v + at) // 4
                found.append(case(variant, layout, bf16=turn % 2 == 1, micro=1 + turn // 2 % 2))
    return found


def special_cases() -> list[dict[str, Any]]:
    """Candidates on the device, activation checkpointing, and weight decay with its two groups of parameters."""
    on_device = {"flags": {"offload_candidates": False}}
    layouts = ("zero0", "zero2", "zero3", "zero3 all offload")
    found = [case("fifo", layout, bf16=at % 2 == 1, **on_device) for at, layout in enumerate(layouts)]
    found += [case("fifo", layout, recompute=True) for layout in ("zero0", "zero1", "zero2", "zero3")]
    decayed = (("zero0", False), ("zero1", True), ("zero2", False), ("zero3 small", False), ("zero3 all offload", True))
    found += [case("fifo", layout, bf16=bf16, decay=3.0) for layout, bf16 in decayed]
    return found + family_cases()


def family_cases() -> list[dict[str, Any]]:
    """GPT-2 with its tied head and NeoX, biases included, every method under a third of the layouts each."""
    found = []
    for f, family in enumerate(("gpt2", "neox")):
        for v, variant in enumerate(("fifo", "merge", "full")):
            layouts = ["zero0", "zero1", "zero2 offload", "zero3", "zero3 small", "zero3 all offload"][(f + v) % 3 :: 3]
            found += [case(variant, layout, family=family, bf16=(v + i) % 2 == 1) for i, layout in enumerate(layouts)]
    return found


def clipped_cases() -> list[dict[str, Any]]:
    kinds = (("fifo", False), ("fifo", True))
    return [case(variant, layout, bf16=bf16, clip=0.5) for variant, bf16 in kinds for layout in SMALL_SET]


def four_rank_cases() -> list[dict[str, Any]]:
    found = [case("fifo", layout, micro=1 + at % 2) for at, layout in enumerate(SMALL_SET)]
    found += [case("fifo", layout, bf16=True) for layout in ("zero0", "zero2", "zero3 all offload")]
    found += [case("full", "zero2", bf16=True, micro=2), case("merge", "zero3 small"), case("merge", "zero2")]
    return found + [case(variant, "zero3 small", clip=0.5) for variant in ("random", "lora")]


def test_every_method_of_the_registry_is_in_the_matrix() -> None:
    assert METHODS.keys() == REGISTRY.keys(), "a method needs a line in equality_cases.METHODS"
    assert {variant["method"] for variant in VARIANTS.values()} == REGISTRY.keys()


def launch(world: int, cases: list[dict[str, Any]], folder: Path) -> list[Report]:
    """Each case with the reports of all ranks."""
    ranks = run_ranks("tests.engine.equality_cases:compare", world, cases, folder, timeout=800)
    return [(case, list(found)) for case, found in zip(cases, zip(*ranks, strict=True), strict=True)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, every_cell: bool) -> dict[int, list[Report]]:
    """By number of ranks."""
    folder = tmp_path_factory.mktemp("equality")
    return {
        1: launch(1, exact_cases(SMALL_SET[::2], every_cell) + clipped_cases()[::3], folder),
        2: launch(2, exact_cases(LAYOUTS, every_cell) + special_cases() + clipped_cases(), folder),
        4: launch(4, four_rank_cases(), folder),
    }


def beyond(worst: dict[str, dict[str, float]], limit: float, how: str = "max") -> dict[str, float]:
    """The kinds of tensor that differ by more than ``limit``."""
    return {kind: found[how] for kind, found in worst.items() if not found[how] <= limit}


@pytest.mark.parametrize("world", [1, 2])
def test_bitwise_equal_to_dense_training(reports: dict[int, list[Report]], world: int) -> None:
    exact = [(case, ranks) for case, ranks in reports[world] if "clip" not in case]
    assert len(exact) >= {1: 15, 2: 70}[world]
    for case, ranks in exact:
        for report in ranks:
            assert beyond(report["worst"], 0.0) == {}, case
            expected = {"loss", "master", "exp_avg", "exp_avg_sq", "forward", "births", "gathered"}
            assert expected <= report["worst"].keys()
            assert ({"weight"} <= report["worst"].keys()) == (case["method"] != "full")
            assert ({"pool"} <= report["worst"].keys()) == (case["method"] == "switchlora")


@pytest.mark.parametrize(("world", "largest"), [(1, 1e-5), (2, 1e-5), (4, LR / 50)])
def test_fp32_with_clipping_or_on_four_ranks(reports: dict[int, list[Report]], world: int, largest: float) -> None:
    """Rounding of 1e-7 is seen as it is, but for single elements right after a reset of their moments: AdamW
    divides by the gradient's own size, so where the terms of a gradient cancel the update is off by a share of LR.
    """
    chosen = [(case, ranks) for case, ranks in reports[world] if "clip" in case or world == 4]
    chosen = [(case, ranks) for case, ranks in chosen if not case.get("bf16")]
    assert len(chosen) >= 2
    for case, ranks in chosen:
        for report in ranks:
            assert beyond(report["worst"], largest) == {}, case
            assert beyond(report["worst"], LR / 1000, "rms") == {}, case
            assert max(report["worst"]["births"]["max"], report["worst"]["gathered"]["max"]) == 0.0


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_with_clipping(reports: dict[int, list[Report]], world: int) -> None:
    """The scale of the gradient differs in its last bit, which the float32 masters see; a forward copy then may
    round to the neighbouring bfloat16, 2^-8 of its value at most."""
    chosen = [(case, ranks) for case, ranks in reports[world] if "clip" in case and case.get("bf16")]
    assert chosen
    for case, ranks in chosen:
        for report in ranks:
            forward = {"forward": report["worst"].pop("forward")}
            assert beyond(report["worst"], 1e-5) == {}, case
            assert beyond(forward, 2.0**-8) == {} and beyond(forward, 1e-5, "rms") == {}


def test_bf16_on_four_ranks(reports: dict[int, list[Report]]) -> None:
    """gloo rounds to bfloat16 after each of its additions, so a gradient is known to about 2^-8 of the largest term.

    AdamW scales that up where the terms cancel: an element whose gradient is all rounding moves by up to the
    learning rate in either direction, so no element may be off by more than both runs can have moved it, and
    on average (root mean square) masters differ by less than a quarter of one update.
    """
    chosen = [(case, ranks) for case, ranks in reports[4] if case.get("bf16")]
    assert len(chosen) == 4
    for case, ranks in chosen:
        for report in ranks:
            worst = report["worst"]
            assert worst["births"]["max"] == worst["gathered"]["max"] == 0.0
            assert worst["loss"]["max"] < 2e-3, case
            assert worst["master"]["max"] < 2 * STEPS * LR and worst["master"]["rms"] < LR / 4, case
            assert beyond({k: worst[k] for k in ("weight", "pool") if k in worst}, LR / 4, "rms") == {}, case


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_runs_had_something_to_compare(reports: dict[int, list[Report]], world: int) -> None:
    for case, ranks in reports[world]:
        for report in ranks:
            least = 0.0 if "family" in case else 0.05
            assert report["learned"] > least or case["variant"] in SLOW, case
            assert report["idle"] == [], f"{case}: tensors without a gradient"
            assert report["switched"][0] == report["switched"][1]
            assert (report["switched"][0] > 20) == (case["method"] == "switchlora"), case
            assert report["overflowed"] == (case["variant"] in ("overflow", "overflow random", "freeze 0")), case


MERGES = {"merge": 2, "merge, both masks": 2, "merge, zero": 1, "merge, random": 2, "merge, drawn B": 2}
PROBING = ("golore", "galore", "heterolora")  # forward passes beyond those of training
SLOW = set(MERGES) - {"merge"} | {"lte"}
ZEROED = {"merge": 0.7, "merge, both masks": 0.5, "merge, zero": 1.0, "merge, random": 0.7}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_merges_pruned_what_they_should(reports: dict[int, list[Report]], world: int) -> None:
    """The share of zeros of both moments, counted over shards, is that of the dense run and what was asked for."""
    merging = [(case, ranks) for case, ranks in reports[world] if case["method"] == "relora"]
    assert {case["variant"] for case, _ in merging} >= (set(MERGES) if world == 2 else {"merge"})
    for case, ranks in merging:
        for report in ranks:
            found, expected = report["counters"]
            assert found["merges"] == expected["merges"] == MERGES[case["variant"]], case
            for moment in ("exp_avg", "exp_avg_sq") if case["variant"] in ZEROED else ():
                share = found[f"zeroed_{moment}"]
                assert share == pytest.approx(ZEROED[case["variant"]], abs=0.05), case
                assert share == pytest.approx(expected[f"zeroed_{moment}"], abs=0.0 if world < 4 else 0.01), case


def test_recomputing_runs_every_block_twice(reports: dict[int, list[Report]]) -> None:
    cases = [(case, ranks) for case, ranks in reports[2] if case.get("recompute")]
    assert len(cases) == 4 and all(report["calls"] == 2 * STEPS + 1 for _, ranks in cases for report in ranks)
    plain = [(case, ranks) for case, ranks in reports[1] if case["method"] not in PROBING]
    assert all(ranks[0]["calls"] == (STEPS + 1) * case.get("micro", 1) for case, ranks in plain)


def test_random_order_is_another_order(reports: dict[int, list[Report]]) -> None:
    pools = {case["variant"]: ranks[0]["pools"] for case, ranks in reports[2] if "recompute" not in case}
    assert pools["fifo"] != pools["random"] and pools["overflow"] != pools["overflow random"]


def test_the_comparison_notices_one_bit() -> None:
    """What ``compare`` reports for a master, a loss and a clock that are off, and for NaN."""
    tensors = {"master/w": torch.ones(3), "exp_avg/w": torch.ones(3), "births": torch.zeros(2, dtype=torch.int64)}
    reference = Run([1.0, 2.0], {**tensors, "gathered": torch.zeros(1)})
    assert beyond(difference(reference, reference), 0.0) == {}
    changed = {
        "master/w": torch.tensor([1.0, 1.0 + 2.0**-23, 1.0]),
        "exp_avg/w": torch.tensor([1.0, torch.nan, 1.0]),
        "births": torch.tensor([0, 1]),
        "gathered": torch.tensor([0.0, 0.0, 1e-30]),
    }
    for name, tensor in changed.items():
        run = Run([1.0, 2.0], {**reference.tensors, name: tensor})
        assert list(beyond(difference(run, reference), 0.0)) == [name.split("/")[0]]
    assert list(beyond(difference(Run([1.0, 2.5], reference.tensors), reference), 0.0)) == ["loss"]
