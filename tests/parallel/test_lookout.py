"""Ranks as real processes: one ends badly, the others follow at once and the first error is the last one shown."""

from __future__ import annotations

import time

import pytest

from megalowrank.errors import EXIT_FAILED, EXIT_HUNG, EXIT_MISTAKE, EXIT_PEER
from tests.harness import warm_context
from tests.parallel import lookout_cases

KILLED = -9
# how each rank ends: the exit codes, and what is shown last
CASES = {
    "the last is killed": (["sleep", "collective", "kill"], [EXIT_PEER, EXIT_PEER, KILLED], "rank 2 ended without"),
    "the first is killed": (["kill", "sleep", "collective"], [KILLED, EXIT_PEER, EXIT_PEER], "rank 0 ended without"),
    "one raises": (["collective", "raise"], [EXIT_PEER, EXIT_FAILED], "rank 1 failed: ValueError: the disk of"),
    "the first raises": (["raise", "sleep"], [EXIT_FAILED, EXIT_PEER], "the disk of this rank is on fire"),
    "one has a mistake": (["sleep", "mistake"], [EXIT_PEER, EXIT_MISTAKE], "rank 1: error: --data-path is not there"),
    "all have the same mistake": (["mistake", "mistake"], [EXIT_MISTAKE, EXIT_MISTAKE], "--data-path is not there"),
    "one hangs": (["sleep", "hang"], [EXIT_PEER, EXIT_HUNG], "rank 1 failed: hung: nothing for 2 seconds"),
    "the first is done early": (["well", "late", "late"], [0, 0, 0], ""),
    "the first is done late": (["late", "well", "well"], [0, 0, 0], ""),
    "strangers connect": (["late", "strangers", "well"], [0, 0, 0], ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], str]]:
    """Of every case, all at once: exit codes, and what all ranks wrote to standard error, in order."""
    context = warm_context()
    root = tmp_path_factory.mktemp("lookout")
    running = {}
    for number, (name, (endings, _, _)) in enumerate(CASES.items()):
        error = root / f"error_{number}"
        error.touch()
        rest = [
            (str(root / f"store_{number}"), len(endings), rank, how, str(error)) for rank, how in enumerate(endings)
        ]
        running[name] = [context.Process(target=lookout_cases.start, args=words) for words in rest], error
        for process in running[name][0]:
            process.start()
    deadline = time.monotonic() + 100
    for processes, _ in running.values():
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
    return {name: ([p.exitcode or 0 for p in ranks], error.read_text()) for name, (ranks, error) in running.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_others_follow_at_once(outcomes: dict[str, tuple[list[int], str]], name: str) -> None:
    _, expected, last = CASES[name]
    codes, error = outcomes[name]
    assert codes == expected, error
    lines = [line for line in error.splitlines() if line.strip()]
    assert (last in lines[-1]) if last else not lines, error


def test_the_error_itself_is_shown_where_it_happened(outcomes: dict[str, tuple[list[int], str]]) -> None:
    """The traceback of the rank that failed is there, those of ranks that only noticed are not."""
    _, error = outcomes["one raises"]
    assert error.count("Traceback") == 1 and 'raise ValueError("the disk' in error


def test_stacks_of_a_rank_that_hangs_show_where(outcomes: dict[str, tuple[list[int], str]]) -> None:
    _, error = outcomes["one hangs"]
    assert "most recent call first" in error and "lookout_cases.py" in error and " in end" in error
