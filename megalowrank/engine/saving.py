"""When checkpoints of a run are written, and that training goes on meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megalowrank.checkpoint.background import Background
from megalowrank.checkpoint.write import Retention, save_checkpoint
from megalowrank.config import OutputConfig
from megalowrank.engine.loop import Position
from megalowrank.engine.resume import GroupRanks, RunState


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

    def save(self, position: Position) -> None:
        """Write a checkpoint at ``position``; with ``--async-save`` it returns when the state is copied.

        Every rank calls it. Raises TrainingError if this save, or the one before in the background, fails.
        """
        started = time.monotonic()
        self._background.wait()
        root, keep = Path(self.output.save or "."), Retention(self.output.keep_last, self.output.keep_every)
        pieces, state = self.state.pieces(copied=self.output.async_save), self.state.record(position)
        step = position.step
        self._background.start(lambda: save_checkpoint(root, step, pieces, state, self.ranks, keep))
        if not self.output.async_save:
            self._background.wait()
        self._saved_at = time.monotonic()
        self.lost += self._saved_at - started

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
