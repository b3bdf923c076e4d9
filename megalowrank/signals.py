"""Signals that ask a run to stop: SIGTERM, SIGUSR1 and the first Ctrl-C.

They only leave a note, which the run reads between two updates. A program listens before it imports the libraries,
because until then such a signal ends the process.
"""

from __future__ import annotations

import signal
from types import FrameType

_LISTENED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[str] = []


def listen() -> None:
    """From now on note these signals instead of dying of them. Main thread only; a second Ctrl-C still interrupts."""
    _received.clear()
    for number in _LISTENED:
        signal.signal(number, _note)


def received() -> str:
    """The name of the first signal since ``listen``; empty if there was none."""
    return _received[0] if _received else ""


def ignore() -> None:
    """From now on these signals have no effect: what they would stop is over."""
    for number in _LISTENED:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    _received.append(signal.Signals(number).name)
