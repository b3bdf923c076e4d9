"""NaN or infinity on one rank: all ranks skip that update, nothing changes, and the run goes on as if it were not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.equality_cases import STEPS
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(600)

CPU = {"device": "cpu"}
ALL_OFFLOAD = {
    "offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0, "sub_group_size": 40,
}  # fmt: skip
SWITCHING = {"method": "switchlora", "budget": 10}
Reports = list[tuple[dict[str, Any], list[dict[str, Any]]]]


def cases() -> list[dict[str, Any]]:
    found = [
        {**SWITCHING, "stage": stage, "bf16": bf16, "fault": fault, "bad": [2]}
        for stage in range(4) for bf16 in (False, True) for fault in ("nan loss", "inf gradient")
    ]  # fmt: skip
    offload = {"offload_optimizer": CPU}
    for stage, zero in ((1, offload), (2, offload), (3, ALL_OFFLOAD)):
        faults = ("inf gradient", "nan loss") if stage == 2 else ("nan loss", "inf gradient")
        found += [{**SWITCHING, "stage": stage, "zero": zero, "bf16": bf16, "fault": fault, "bad": [0, 3, 4]}
                  for bf16, fault in zip((False, True), faults, strict=True)]  # fmt: skip
    twice = {"micro": 2, "fault": "inf loss", "bad": [1, 6]}
    found += [{**SWITCHING, **twice, "stage": stage, "bf16": stage % 2 == 1} for stage in range(4)]
    found += [{"method": "full", "budget": 1, "stage": stage, "fault": "nan loss", "bad": [5]} for stage in (0, 3)]
    return found


def exhausted() -> list[dict[str, Any]]:
    """The last one allows no skip at all."""
    return [{**SWITCHING, "budget": 0 if stage == 3 else 2, "stage": stage, "fault": "nan loss", "bad": [1, 3, 4]}
            for stage in range(4)]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder, payload = tmp_path_factory.mktemp("non_finite"), cases() + exhausted()
    ranks = run_ranks("tests.engine.non_finite_cases:survive", 2, payload, folder, timeout=500)
    return list(zip(payload, map(list, zip(*ranks, strict=True)), strict=True))


def survivors(reports: Reports) -> Reports:
    return reports[: len(cases())]


def test_all_ranks_skip_and_count_alike(reports: Reports) -> None:
    for case, ranks in survivors(reports):
        attempts = STEPS + len(case["bad"])
        for report in ranks:
            assert report["applied"] == [attempt not in case["bad"] for attempt in range(attempts)], case
            assert report["position"] == [STEPS, attempts, len(case["bad"])]
            assert report["error"] == ""


def test_a_skipped_attempt_changes_nothing(reports: Reports) -> None:
    """Masters, moments, forward copies, W, pools, clocks and the number of updates."""
    for case, ranks in survivors(reports):
        for report in ranks:
            assert report["changed"] == [{}] * len(case["bad"]), case


def test_the_method_is_called_once_for_every_update(reports: Reports) -> None:
    for _, ranks in survivors(reports):
        for report in ranks:
            assert report["announced"] == list(range(STEPS))


def test_replicas_agree_and_equal_the_run_without_the_bad_batches(reports: Reports) -> None:
    """Bitwise: no gradient of a skipped attempt is left behind."""
    for case, ranks in survivors(reports):
        assert ranks[0]["digest"] == ranks[1]["digest"], case
        assert [report["off"] for report in ranks] == [{}, {}], case
    assert len({ranks[0]["digest"] for _, ranks in reports}) > 8


def test_beyond_the_budget_all_ranks_stop(reports: Reports) -> None:
    stopped = reports[len(cases()) :]
    assert len(stopped) == 4
    for case, ranks in stopped:
        last = case["bad"][case["budget"]]
        for report in ranks:
            skipped = case["budget"] + 1
            assert report["error"].startswith(f"{skipped} updates were skipped"), case
            assert f"--max-skipped-steps {case['budget']}" in report["error"]
            assert report["position"] == [last + 1 - skipped, last + 1, skipped]
            assert report["off"] == {} and report["changed"][-1] == {}
            assert report["announced"] == list(range(report["position"][0] + 1))
