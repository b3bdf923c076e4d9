"""One piece of work at a time, in a thread: writing a checkpoint while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs work in a thread of its own, the next only after the one before; errors reach whoever waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that nobody has seen; ``wait`` raises it. Never blocks."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the work before, then begin this one; raises the error of the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is running; raises the error of what ran."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
