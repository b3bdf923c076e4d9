"""Ends a run in which nothing happens any more, after showing where every thread of it stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megalowrank.errors import EXIT_HUNG

_PATIENCE = 10.0  # seconds for writing stacks
_BACKUP = 30.0  # seconds after which the stacks are written by a thread that needs no interpreter


class Watchdog:
    """Expects a ``beat`` at least every ``seconds`` (0: never ends anything) from ``start`` to ``close``.

    Otherwise the stacks of all threads go to ``folder``/stacks_rank_XXXXX.txt (standard error without a folder),
    ``tell`` gets the reason, and the process ends with exit code 76. Should the interpreter itself be stuck, the
    stacks still go to standard error, half a minute later, with exit code 1.
    """

    def __init__(self, seconds: float, rank: int, folder: Path | None, tell: Callable[[str], None]) -> None:
        self.seconds, self.rank, self.tell = seconds, rank, tell
        self.folder = folder
        self._last, self._where = time.monotonic(), "the start"
        self._armed = 0.0
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        if self.seconds:
            self.beat("the start")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, where: str) -> None:
        """Something was done; ``where`` says what comes now, in words for the message."""
        self._last, self._where = time.monotonic(), where
        if self.seconds and self._last - self._armed > self.seconds / 4:
            self._armed = self._last
            faulthandler.dump_traceback_later(1.25 * self.seconds + _BACKUP, exit=True)

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def show(self, reason: str) -> None:
        """Write the stacks of all threads of this process, and where they are."""
        print(f"rank {self.rank}: {reason}", file=sys.stderr, flush=True)
        if self.folder is None:
            faulthandler.dump_traceback(all_threads=True)
            return
        try:
            self._write(reason)
        except OSError as error:
            print(
                f"rank {self.rank}: the stacks of its threads cannot be written: {error}", file=sys.stderr, flush=True
            )
            faulthandler.dump_traceback(all_threads=True)

    def _write(self, reason: str) -> None:
        assert self.folder is not None
        path = self.folder / f"stacks_rank_{self.rank:05d}.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            print(reason, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"rank {self.rank}: the stacks of its threads are in {path}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last >= self.seconds:
                reason = f"hung: nothing for {self.seconds:g} seconds (--hang-timeout) after {self._where}"
                self.tell(reason)
                leave = threading.Timer(_PATIENCE, os._exit, (EXIT_HUNG,))  # should the disk be what hangs
                leave.daemon = True
                leave.start()
                self.show(reason)
                os._exit(EXIT_HUNG)
