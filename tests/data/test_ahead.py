"""Reading ahead: same batches as reading now, in time, and errors where they belong."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from megalowrank.data.ahead import BatchesAhead


class Recorded:
    """Samples that say what was asked for, slowly."""

    def __init__(self, seconds: float = 0.0, broken: int = -1) -> None:
        self.seconds, self.broken = seconds, broken
        self.asked: list[tuple[int, ...]] = []
        self.threads: list[int] = []

    def micro_batch(self, *place: int) -> torch.Tensor:
        self.asked.append(place)
        self.threads.append(threading.get_ident())
        time.sleep(self.seconds)
        if place[0] == self.broken:
            raise OSError("disk gone")
        return torch.tensor(place)


def make(samples: Any) -> BatchesAhead:
    return BatchesAhead(samples, 4, 3, dp_rank=1, dp_size=2)


def test_batches_are_those_of_the_sampler_in_any_order() -> None:
    samples = Recorded()
    ahead = make(samples)
    for attempt in (0, 1, 2, 7, 8, 3, 3, 4):
        assert [it.tolist() for it in ahead.take(attempt)] == [[attempt, index, 4, 1, 2] for index in range(3)]
    ahead.close()


def test_the_next_update_is_read_while_the_caller_works() -> None:
    ahead = make(Recorded(0.05))
    ahead.take(0)
    first = ahead.waited
    assert first >= 0.15
    for attempt in range(1, 4):
        time.sleep(0.4)
        ahead.take(attempt)
    assert ahead.waited - first < 0.1
    ahead.take(9)
    assert ahead.waited - first >= 0.15
    ahead.close()


def test_one_thread_reads_ahead_once() -> None:
    samples = Recorded()
    ahead = make(samples)
    for attempt in range(5):
        ahead.take(attempt)
    ahead.close()
    assert [place[0] for place in samples.asked[:15]] == [n for n in range(5) for _ in range(3)]
    assert len(set(samples.threads[3:])) == 1 and samples.threads[3] != threading.get_ident()


def test_an_error_surfaces_when_its_update_is_asked_for() -> None:
    ahead = make(Recorded(broken=2))
    ahead.take(0)
    ahead.take(1)
    with pytest.raises(OSError, match="disk gone"):
        ahead.take(2)
    assert len(ahead.take(3)) == 3
    ahead.close()
    with pytest.raises(RuntimeError):
        ahead.take(4)
