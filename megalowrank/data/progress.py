"""How preprocessing is going, on a terminal as a bar and elsewhere as lines."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megalowrank.data.parts import Progress

_FORMAT = "{percentage:3.0f}% {bar} {desc}"


def report(line: str, start: float) -> float:
    """Print what was done since ``start`` (monotonic seconds) and how long it took; returns the time now."""
    now = time.monotonic()
    print(f"{line}, {now - start:.1f} s", flush=True)
    return now


class ProgressLine:
    """Prints parts, MB of text, MB/s and the time left to stderr, every ``interval`` seconds if it is no terminal."""

    def __init__(self, interval: float) -> None:
        self.interval, self._last = interval, time.monotonic()
        self._bar: tqdm | None = None

    def show(self, state: Progress) -> None:
        """Say where ``state`` stands, if it is time to."""
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=state.total_weight, bar_format=_FORMAT, file=sys.stderr)
            self._bar.n = state.weight
            self._bar.set_description_str(describe(state))
            return
        now, ended = time.monotonic(), state.parts == state.total_parts
        if now - self._last >= self.interval or ended:
            self._last = now
            print(describe(state), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._bar.close()


def describe(state: Progress) -> str:
    """One line: parts, text and speed of this run, time left."""
    left = tqdm.format_interval(state.seconds_left) if state.seconds_left is not None else "?"
    speed = f"{state.text_bytes / 1e6:.1f} MB of text, {state.megabytes_per_second:.2f} MB/s"
    return f"part {state.parts} of {state.total_parts}, {speed}, ETA {left}"
