"""Sharded, offloaded and accumulated training is dense training: ZeRO 0 to 3 against one plain process.

On one and on two ranks every sum has at most two terms or a known order, which the dense reference follows
(``equality_cases.groups_of``), so masters, moments, forward copies, W with its residual, pools, clocks and
losses are compared bit by bit. On four ranks gloo adds in an order of its own, and with clipping the norm is
summed partition by partition: there the comparison has a tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.equality_cases import LR, STEPS
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
}
NO_OFFLOAD = {"method": "switchlora", "flags": {"offload_candidates": False}}


def exact_cases() -> list[dict[str, Any]]:
    """Every variant under every layout and precision; accumulation 1 and 2 for FIFO, one of them for the others."""
    found = []
    for v, (variant, method) in enumerate(VARIANTS.items()):
        for at, (layout, zero) in enumerate(LAYOUTS.items()):
            for bf16 in (False, True):
                micros = (1, 2) if variant == "fifo" else (1 + (v + at + bf16) % 2,)
                found += [{"name": f"{variant}, {layout}", **method, **zero, "bf16": bf16, "micro": m} for m in micros]
    for layout in ("zero0", "zero2", "zero3", "zero3 all offload"):
        found += [{"name": f"candidates on device, {layout}", **NO_OFFLOAD, **LAYOUTS[layout], "bf16": bf16}
                  for bf16 in (False, True)]  # fmt: skip
    for layout in ("zero0", "zero1", "zero2", "zero3", "zero3 small"):
        found.append({"name": f"recompute, {layout}", "method": "switchlora", **LAYOUTS[layout], "recompute": True})
    return found


def clipped_cases() -> list[dict[str, Any]]:
    return [
        {"name": f"clip, {variant}, {layout}", **VARIANTS[variant], **LAYOUTS[layout], "bf16": bf16, "clip": 0.5}
        for variant in ("fifo", "full") for layout in LAYOUTS for bf16 in (False, True)
    ]  # fmt: skip


def four_rank_cases() -> list[dict[str, Any]]:
    plain = [
        {"name": f"{variant}, {layout}", **VARIANTS[variant], **LAYOUTS[layout], "bf16": bf16, "micro": 1 + at % 2}
        for variant in ("fifo", "full") for at, layout in enumerate(LAYOUTS) for bf16 in (False, True)
    ]  # fmt: skip
    more = [{"name": f"{v}, zero{s}", **VARIANTS[v], "stage": s} for v in ("random", "overflow") for s in (2, 3)]
    return plain + more + [{**case, "clip": 0.5} for case in more]


def launch(world: int, cases: list[dict[str, Any]], folder: Path) -> list[Report]:
    """Each case with the reports of all ranks."""
    ranks = run_ranks("tests.engine.equality_cases:compare", world, cases, folder, timeout=800)
    return [(case, list(found)) for case, found in zip(cases, zip(*ranks, strict=True), strict=True)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Report]]:
    """By number of ranks."""
    folder = tmp_path_factory.mktemp("equality")
    return {
        1: launch(1, exact_cases() + clipped_cases(), folder),
        2: launch(2, exact_cases() + clipped_cases(), folder),
        4: launch(4, four_rank_cases(), folder),
    }


@pytest.mark.parametrize("world", [1, 2])
def test_bitwise_equal_without_clipping(reports: dict[int, list[Report]], world: int) -> None:
    checked = 0
    for case, ranks in reports[world]:
        if "clip" in case:
            continue
        for report in ranks:
            assert {kind: d["max"] for kind, d in report["worst"].items() if d["max"]} == {}, case
            checked += len(report["worst"])
    assert checked > 1000 * world
