"""Every shipped DeepSpeed JSON, and every key that is passed on, initialises an engine and trains.

One launch trains the same model on the same data under all of them, so a key that DeepSpeed applies
wrongly shows as a different loss or gradient norm (AdamW alone would hide a scaled gradient).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, run_ranks

NAMES = ["zero0", "zero1", "zero1_pp", "zero2", "zero2_offload", "zero3", "zero3_offload"]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
CPU = {"device": "cpu"}


def keys(stage: int, top: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **zero}, **(top or {})}


PRINTS = {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "log_level": "info"}
TIMES = {"steps_per_print": 1, "comms_logger": {"enabled": True}, "timers": {"throughput": {"enabled": True}}}
VARIANTS = [
    keys(0, {"prescale_gradients": True}),
    keys(0, {"gradient_predivide_factor": 2.0}),
    keys(1, {"prescale_gradients": True}, reduce_scatter=False),
    keys(1, contiguous_gradients=False, use_multi_rank_bucket_allreduce=False, reduce_bucket_size=40),
    keys(1, parameter_alignment=True, overlap_comm=True, allgather_bucket_size=40),
    keys(2, {"gradient_predivide_factor": 4.0}, reduce_scatter=False),
    keys(2, ignore_unused_parameters=False, offload_optimizer={**CPU, "pin_memory": False, "buffer_count": 3}),
    keys(3, {"communication_data_type": "fp32"}, reduce_scatter=False, reduce_bucket_size=40, sub_group_size=40),
    keys(3, stage3_param_persistence_threshold=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0,
         stage3_prefetch_bucket_size=0, stage3_model_persistence_threshold=0, enable_sanity_checks=True,
         log_trace_cache_warnings=True),
    keys(3, offload_param={**CPU, "buffer_count": 3, "buffer_size": 1000, "max_in_cpu": 10}),
    keys(2, {**PRINTS, **TIMES}),
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Any]]]]:
    """For each kind of case, the reports of both ranks."""
    groups = {
        "shipped fp32": [{"json": str(path), "bf16": False} for path in SHIPPED],
        "shipped bf16": [{"json": str(path), "bf16": True} for path in SHIPPED],
        "variants": [{"json": variant, "bf16": False} for variant in VARIANTS],
    }
    payload = [case for cases in groups.values() for case in cases]
    ranks = run_ranks("tests.engine.ds_config_cases:train_each", 2, payload, tmp_path_factory.mktemp("ds"), 200)
    found, start = {}, 0
    for name, cases in groups.items():
        found[name] = [rank[start : start + len(cases)] for rank in ranks]
        start += len(cases)
    return found


def test_all_files_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == NAMES


@pytest.mark.parametrize("kind, tolerance", [("shipped fp32", 1e-5), ("variants", 1e-5), ("shipped bf16", 1e-2)])
def test_each_trains_like_zero_0(reports: dict[str, Any], kind: str, tolerance: float) -> None:
    reference = reports["shipped fp32"][0][0]
    for rank in reports[kind]:
        for report in rank:
            assert all(map(math.isfinite, report["losses"] + report["norms"]))
            assert report["losses"] == pytest.approx(reference["losses"], rel=tolerance)
            assert report["norms"] == pytest.approx(reference["norms"], rel=tolerance)


def test_stage_and_accumulation_are_what_the_file_says(reports: dict[str, Any]) -> None:
    found = [(Path(path).stem, report["stage"], report["accumulation"])
             for path, report in zip(SHIPPED, reports["shipped bf16"][1], strict=True)]  # fmt: skip
    assert found == [(name, int(name[4]), 2) for name, _, _ in found]


def test_the_model_learns_something_to_compare(reports: dict[str, Any]) -> None:
    reference = reports["shipped fp32"][0][0]
    assert reference["losses"][0] != reference["losses"][1]
    assert reference["norms"][0] > 0.5, "clipping must have something to do"
