"""Predicted collectives against those of real updates: bytes and calls, by group and collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.wire import group_name, wire_bytes
from tests.harness import run_ranks
from tests.models.wire_cases import FAMILIES, LENGTH, ROWS, method_of

LORA = {"method": "lora", "flags": {"lora_rank": 5}}
SOME = {"method": "lora", "flags": {"lora_rank": 5, "lora_target": ["layers.1.*", "o", "down"]}}
FULL = {"method": "full"}
_ZERO = {
    "reduce_bucket_size": "reduce_bucket", "stage3_prefetch_bucket_size": "prefetch_bucket",
    "stage3_param_persistence_threshold": "persistence_threshold", "stage3_max_live_parameters": "max_live",
    "stage3_max_reuse_distance": "max_reuse", "overlap_comm": "overlap_comm", "reduce_scatter": "reduce_scatter",
    "use_multi_rank_bucket_allreduce": "multi_rank_buckets",
}  # fmt: skip


def layout_of(case: dict[str, Any], world: int) -> Layout:
    tensor, pipe, zero = case.get("tensor", 1), case.get("pipe", 1), case["zero"]
    options = {_ZERO[key]: value for key, value in zero.items() if key in _ZERO}
    return Layout(
        zero=zero["stage"], bf16=case.get("bf16", False), data_size=world // (tensor * pipe), tensor_size=tensor,
        pipe_size=pipe, sequence=case.get("sequence", False), schedules=case.get("schedules", {}), micro_batch=ROWS,
        accumulation=case.get("accumulation", 1), seq_length=LENGTH, recompute=bool(case.get("recompute")),
        decay_groups=bool(case.get("decay")), reduce_fp32="communication_data_type" in case.get("deepspeed", {}),
        offload_optimizer="offload_optimizer" in zero, accelerator=False, **options,
    )  # fmt: skip


def predicted(case: dict[str, Any], world: int, stage: int, **options: Any) -> dict[str, list[int]]:
    found = wire_bytes(
        FAMILIES[case["family"]], method_of(case).adapters(), layout_of(case, world), stage, **options
    )  # fmt: skip
    return {f"{group}: {name}": [volume.calls, volume.payload] for (group, name), volume in found.items()}


def check(cases: list[dict[str, Any]], world: int, tmp_path: Path) -> None:
    """The last update of every case on every rank is what was predicted."""
    ranks = run_ranks("tests.models.wire_cases:measure_all", world, cases, tmp_path)
    wrong = []
    for number, case in enumerate(cases):
        for rank, results in enumerate(ranks):
            result = results[number]
            found, expected = result["updates"][-1]["volumes"], predicted(case, world, result["stage"])
            if found != expected:
                wrong.append((case, rank, found, expected))
    assert not wrong, "\n".join(map(str, wrong))


def test_data_parallel(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"family": family, **method, "zero": {"stage": stage}, "bf16": bf16, "accumulation": 1 + (stage == bf16)}
        for family, method in (("llama", LORA), ("gpt2", SOME), ("neox", FULL))
        for stage in range(4) for bf16 in (False, True)
    ]  # fmt: skip
    check(cases, 2, tmp_path)
