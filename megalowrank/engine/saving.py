"""When checkpoints of a run are written, and that training goes on meanwhile."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalowrank.checkpoint.background import Background
from megalowrank.checkpoint.folder import fsync
from megalowrank.checkpoint.write import Retention, save_checkpoint
from megalowrank.config import OutputConfig
from megalowrank.engine.loop import Position
from megalowrank.engine.resume import GroupRanks, RunState
from megalowrank.errors import ConfigError, TrainingError


class Saver:
    """Writes checkpoints of ``state`` as ``output`` says; every rank has one.

    ``group`` are all ranks of the job; where files are written in the background, no one else may use it.
    ``lost`` is how many seconds training waited for saves in all.
    """

    def __init__(self, state: RunState, output: OutputConfig, group: Any) -> None:
        self.state, self.output = state, output
        self.ranks = GroupRanks(group, state.groups.rank, state.groups.world)
        self._background = Background()
        self._saved_at = time.monotonic()
        self.lost = 0.0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts no other run can write into ``--save``. Every rank enters it.

        Raises TrainingError on all ranks if another run does: it may be one that is still ending.
        """
        lock: int | None = -1
        if self.output.save and self.ranks.rank == 0:
            lock = _lock(Path(self.output.save))
        if not self.ranks.all_ok(lock is not None):
            raise TrainingError(f"another run is writing into --save {self.output.save}")
        try:
            yield
        finally:
            if lock is not None and lock >= 0:
                os.close(lock)

    def save(self, position: Position) -> None:
        """Write a checkpoint at ``position``; with ``--async-save`` it returns when the state is copied.

        Every rank calls it. Raises TrainingError if this save, or the one before in the background, fails.
        """
        started = time.monotonic()
        self._background.wait()
        root, keep = Path(self.output.save or "."), Retention(self.output.keep_last, self.output.keep_every)
        pieces, state = self.state.pieces(copied=self.output.async_save), self.state.record(position)
        step = position.step

        def work() -> None:
            if self.ranks.rank == 0:
                self._keep_metrics()
            save_checkpoint(root, step, pieces, state, self.ranks, keep)

        self._background.start(work)
        if not self.output.async_save:
            self._background.wait()
        self._saved_at = time.monotonic()
        self.lost += self._saved_at - started

    def _keep_metrics(self) -> None:
        """Have the log lines before this checkpoint on disk as well: whoever resumes it does not write them again."""
        path = Path(self.output.output_dir or self.output.save or ".") / "metrics.jsonl"
        if path.exists():
            fsync(path)

    def overdue(self) -> bool:
        """Whether the last save is more than ``--save-seconds`` ago."""
        seconds = self.output.save_seconds
        return seconds > 0 and time.monotonic() - self._saved_at >= seconds

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; ``wait`` raises its error."""
        return self._background.failed

    def wait(self) -> None:
        """Return when every checkpoint is on disk. Raises TrainingError if one is not."""
        started = time.monotonic()
        self._background.wait()
        self.lost += time.monotonic() - started


def _lock(folder: Path) -> int | None:
    """The file handle that holds the folder until it is closed or the process ends; None if another process has it.

    -1 where the filesystem has no locks. Raises ConfigError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError("cannot write the folder of --save", f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        return -1
    return handle
