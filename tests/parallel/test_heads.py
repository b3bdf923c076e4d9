"""Groups across heads: what they give, and what is said of a head that does not come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.errors import EXIT_FAILED, EXIT_PEER, ConfigError
from megalowrank.parallel.heads import check_heads
from tests.harness import run_ranks, warm_context
from tests.parallel import head_cases


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four ranks in two heads."""
    folder = tmp_path_factory.mktemp("heads")
    return run_ranks("tests.parallel.head_cases:meet", 4, {"folder": str(folder)}, folder)


def test_the_world_of_a_rank_is_its_head(four: list[dict[str, Any]]) -> None:
    assert [found["inside"] for found in four] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert [found["job"] for found in four] == [[0, 4, 0], [1, 4, 0], [2, 4, 1], [3, 4, 1]]


def test_every_rank_of_every_head_reads_another_part_of_a_batch(four: list[dict[str, Any]]) -> None:
    assert [found["stream"] for found in four] == [[0, 4], [1, 4], [2, 4], [3, 4]]


def test_tensors_are_gathered_by_head_from_ranks_at_the_same_place(four: list[dict[str, Any]]) -> None:
    tiny = float(torch.tensor(1e-8))
    for rank, found in enumerate(four):
        assert found["gathered"] == [[1.0, tiny, rank % 2], [1.0, tiny, rank % 2 + 2]]
        assert found["received"] == 3 * 4, "what the other head sent, in float32"


def test_a_mean_has_the_same_bits_in_every_head(four: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        one, other = four[rank], four[rank + 2]
        assert one["mean"] == other["mean"]
        expected = (torch.tensor(one["drawn"]) + torch.tensor(other["drawn"])) / 2
        assert one["mean"] == expected.tolist()
    assert [found["number"] for found in four] == [1.0, 2.0, 1.0, 2.0]


def test_what_one_rank_asks_for_all_heads_hear(four: list[dict[str, Any]]) -> None:
    assert all(found["answer"] == ["stop"] for found in four)


def test_heads_must_divide_the_ranks() -> None:
    with pytest.raises(ConfigError, match="--lte-heads must divide the number of ranks; got 3 and 4 rank"):
        check_heads(3, 4)


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], str, float]]:
    """Exit codes, standard error and seconds of jobs of three ranks that wait and one that is killed or sleeps."""
    context, root, running = warm_context(), tmp_path_factory.mktemp("lost"), {}
    for how in ("kill", "sleep"):
        error = root / f"error_{how}"
        error.touch()
        ends = ["", "", "", how]
        rest = [(str(root / f"store_{how}"), 4, rank, end, str(error)) for rank, end in enumerate(ends)]
        running[how] = [context.Process(target=head_cases.start, args=words) for words in rest], error
        for process in running[how][0]:
            process.start()
    return {how: outcome(processes, error) for how, (processes, error) in running.items()}


def outcome(processes: list[Any], error: Path) -> tuple[list[int], str, float]:
    began = time.monotonic()
    for process in processes:
        process.join(max(0.0, began + 40 - time.monotonic()))
        process.kill()
        process.join()
    return [p.exitcode or 0 for p in processes], error.read_text(), time.monotonic() - began


def test_a_slow_head_is_named_and_ends_the_job(lost: dict[str, tuple[list[int], str, float]]) -> None:
    codes, error, seconds = lost["sleep"]
    assert "heads cannot meet for the second merge: head 1 did not come" in error, error
    assert all(code in (EXIT_FAILED, EXIT_PEER) for code in codes), (codes, error)
    assert seconds < 35


def test_a_head_that_died_is_named(lost: dict[str, tuple[list[int], str, float]]) -> None:
    codes, error, seconds = lost["kill"]
    assert "head 1 did not come" in error or "rank 3 ended without a word" in error, error
    assert codes[3] == -9 and all(code in (EXIT_FAILED, EXIT_PEER) for code in codes[:3]), (codes, error)
    assert seconds < 35
