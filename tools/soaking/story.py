"""One training run that is killed and goes on, again and again, and what is checked after every death."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.folder import number, steps
from megalowrank.checkpoint.io import Checkpoint, find_auto
from megalowrank.errors import ConfigError, TrainingError
from soaking.ranks import Job
from soaking.sabotage import Saboteur

_LIMIT = 600.0  # seconds for a run, whatever the machine does besides
_ALONE = 15.0  # seconds for the other ranks to end by themselves
_BY_CLOCK = {
    "tokens_per_second", "step_time_ms", "method_time_ms", "data_time_ms", "memory_bytes", "tflops_per_rank", "mfu",
}  # fmt: skip


class Story:
    """A run with ``flags`` on ``world`` ranks in ``folder``; ``counts`` are of everything that happened to it."""

    def __init__(self, flags: Sequence[str], world: int, folder: Path, counts: Counter[str]) -> None:
        self.flags, self.world, self.counts = list(flags), world, counts
        self.logs, self.saved, self.note = folder / "logs", folder / "checkpoints", folder / "note.json"
        self.best, self.startup = 0, 2.0
        self.logs.mkdir(parents=True)

    def start(self, *more: str, load: str = "auto", saboteurs: dict[int, Saboteur] | None = None) -> Job:
        """Start the run, or go on with it."""
        self.note.unlink(missing_ok=True)
        flags = [*self.flags, "--save", str(self.saved), "--load", load, *more]
        return Job(flags, self.world, self.logs, saboteurs or {})

    def ends_with(self, code: int, *words: str, load: str = "auto") -> None:
        """Go on undisturbed; TrainingError unless it ends with this code on all ranks and prints these words."""
        job = self.start(load=load)
        job.wait(_LIMIT, after_death=_ALONE)
        said = job.output()
        if set(job.codes.values()) != {code} or not all(word in said for word in words):
            raise TrainingError(f"instead of {code} and {words} a run ended with {job.codes}: {said[-2000:]}")

    def finish(self, *more: str) -> None:
        """Let it go on undisturbed; TrainingError if it does not end well."""
        job = self.start(*more)
        if not job.wait(_LIMIT, after_death=_ALONE) or set(job.codes.values()) != {0}:
            raise TrainingError(f"an undisturbed run ended with {job.codes}: {job.output()[-2000:]}")
        self._check_resumed(job)
        self._check_folder()

    def kill_at(self, point: int, rank: int, *more: str) -> dict[str, Any]:
        """Go on until ``rank`` dies at this write point of its first save; what the saboteur noted."""
        job = self.start(*more, saboteurs={rank: Saboteur(point, self.note)})
        ended = job.wait(_LIMIT, after_death=_ALONE)
        if job.codes[rank] != -9 or not self.note.exists():
            raise TrainingError(f"rank {rank} was not killed at point {point}: {job.codes} {job.output()[-2000:]}")
        self._check_resumed(job)
        self._after_death(job, ended)
        self.counts["kills at write points"] += 1
        return json.loads(self.note.read_text())

    def kill_after(self, updates: int, share: float, ranks: Sequence[int], *more: str) -> bool:
        """Go on for ``updates``, then ``share`` of the time that a start takes, and kill ``ranks``.

        False if the run was complete before.
        """
        started = time.monotonic()
        job = self.start(*more)
        alive = job.until(lambda: job.output(0).count("\nupdate ") >= updates)
        self.startup = time.monotonic() - started if updates else self.startup
        late = time.monotonic() + share * self.startup
        if not alive or not job.until(lambda: time.monotonic() > late):
            self._check_folder()
            return False
        for rank in ranks:
            job.kill(rank)
        ended = job.wait(_LIMIT, after_death=_ALONE)
        if updates:
            self._check_resumed(job)
        self._after_death(job, ended)
        self.counts["kills at random moments"] += 1
        self.counts["of them while files were written"] += bool(list(self.saved.glob(".*.tmp")))
        return True

    def copied_to(self, other: Story) -> Story:
        """``other`` with the checkpoints that this one has now."""
        shutil.copytree(self.saved, other.saved)
        return other

    def step_back(self) -> None:
        """Name the checkpoint before in ``latest``, as a kill between two renames does: the next save replaces one."""
        names = steps(self.saved)
        if len(names) > 1 and (self.saved / "latest").read_text().strip() == names[0]:
            (self.saved / "latest").write_text(f"{names[1]}\n")
            self.best = number(names[1])

    def compare(self, other: Story) -> None:
        """TrainingError unless both logged the same at every update and ended in the same tensors, bit by bit."""
        lines, expected = _lines(self.saved), _lines(other.saved)
        differ = [at for at, pair in enumerate(zip(lines, expected, strict=False)) if pair[0] != pair[1]]
        if differ or len(lines) != len(expected):
            raise TrainingError(f"metrics differ at lines {differ[:5]} of {len(lines)} and {len(expected)}")
        mine, theirs = Checkpoint.open(self.saved), Checkpoint.open(other.saved)
        if mine.names() != theirs.names() or mine.step != theirs.step:
            raise TrainingError(f"{mine.path} and {theirs.path} hold different tensors")
        for name in mine.names():
            if not torch.equal(mine.read(name).view(torch.uint8), theirs.read(name).view(torch.uint8)):
                raise TrainingError(f"{name} differs between {mine.path} and {theirs.path}")
        self.counts["runs compared with the undisturbed one"] += 1
        self.counts["log lines equal"] += len(lines)

    def _check_resumed(self, job: Job) -> None:
        """The run must have gone on from the checkpoint that was found before it."""
        resumed = f"resumed at update {self.best} (" in job.output()
        if resumed != (self.best > 0):
            raise TrainingError(f"the run did not go on at update {self.best}: {job.output()[-2000:]}")
        self.counts["resumed"] += resumed

    def _after_death(self, job: Job, by_themselves: bool) -> None:
        self.counts.update(f"ranks that ended with {code}" for code in job.codes.values())
        self.counts["runs whose other ranks had to be ended"] += not by_themselves
        self._check_folder()

    def _check_folder(self) -> None:
        """TrainingError unless the newest complete checkpoint is there, and every other one is intact."""
        found, refused = find_auto(self.saved)
        step = number(found.name) if found else 0
        damaged = [reason for reason in refused if "latest is missing" not in reason or self.best]
        if damaged or step < self.best:
            raise TrainingError(f"update {self.best} was saved, {found} is found; refused: {damaged}")
        for folder in self.saved.glob("step_*"):
            self._verify(folder)
        self.best = step

    def _verify(self, folder: Path) -> None:
        try:
            Checkpoint.open(folder)
        except ConfigError as error:
            raise TrainingError(f"a kill left a broken checkpoint: {error}") from None
        self.counts["checkpoints verified"] += 1


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock and the machine."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in _BY_CLOCK} for record in records]
