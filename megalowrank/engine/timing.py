"""Time spent in one part of many steps, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the time of marked stretches: host time on the CPU, device time on CUDA.

    On CUDA events are queued and read only in ``take``, which waits for the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the enclosed stretch."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        total = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000.0
        self._seconds, self._events = 0.0, []
        return total
