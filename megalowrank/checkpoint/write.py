"""Writing a checkpoint: beside its place, complete and on disk, then renamed, ``latest`` last.

One safetensors file per rank, a JSON manifest with hashes, and ``latest``. A run killed at any moment leaves the
checkpoint before it untouched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from megalowrank.checkpoint.folder import (
    LEFTOVER,
    SCHEMA,
    check_file,
    fsync,
    in_order,
    number,
    read_bytes,
    sha256,
    steps,
    write_text,
)  # fmt: skip
from megalowrank.checkpoint.pieces import Piece, merge_records, unshared
from megalowrank.errors import ConfigError, TrainingError

_EXPECTED = (OSError, RuntimeError, ConfigError, SafetensorError)


class Ranks(Protocol):
    """The processes that save one checkpoint together: this one is ``rank`` of 0 .. ``world`` - 1."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def barrier(self) -> None:
        """Collective: return when every rank has called it."""

    def all_ok(self, ok: bool) -> bool:
        """Collective, a barrier too: True on every rank if every rank said True."""


@dataclass(frozen=True)
class SoloRanks:
    """A single process."""

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Return at once."""

    def all_ok(self, ok: bool) -> bool:
        """The value given."""
        return ok


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``last`` (0: all) and those whose step divides by ``every`` (0: no others)."""

    last: int = 0
    every: int = 0

    def doomed(self, names: Sequence[str]) -> list[str]:
        """Those of ``names``, newest first, that go."""
        old = names[self.last :] if self.last > 0 else []
        return [name for name in old if not (self.every and number(name) % self.every == 0)]


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    ranks: Ranks,
    keep: Retention = Retention(),  # noqa: B008 - frozen
) -> Path:
    """Save ``root/step_XXXXXXXX``, then name it in ``root/latest``; returns its path.

    Collective: every rank calls it with its own pieces; together they must hold every element of each tensor
    exactly once, so one rank alone gives a replicated tensor. ``state`` is JSON data (string keys; tuples
    come back as lists), taken from rank 0. A checkpoint of the same step is replaced. Every rank reads back what it
    wrote and compares it with memory; ``latest`` changes only when all have. Steps that ``keep`` gives up are removed
    at the end, never the one just saved. All ranks must share the filesystem of ``root``, and one job alone may save
    into it. Raises TrainingError on every rank if any rank cannot do its part; the checkpoints there were stay as
    they were.
    """
    saving = _Saving(Path(root), step, ranks)
    saving.together(lambda: saving.prepare(state), only_first=True)
    saving.together(lambda: saving.write_rank(pieces))
    saving.together(lambda: saving.merge(state), only_first=True)
    saving.together(lambda: saving.publish(keep), only_first=True)
    return saving.final


class _Saving:
    """One save: its folders and its stages. ``together`` is collective, the stages are not."""

    def __init__(self, root: Path, step: int, ranks: Ranks) -> None:
        self.root, self.step, self.ranks = root, step, ranks
        self.name = f"step_{step:08d}"
        self.final, self.temp = root / self.name, root / f".{self.name}.tmp"

    def together(self, stage: Callable[[], None], only_first: bool = False) -> None:
        """Run a stage on every rank or on rank 0 only, and fail on every rank if it failed on one."""
        error: Exception | None = None
        if self.ranks.rank == 0 or not only_first:
            try:
                stage()
            except Exception as caught:
                error = caught
                self._leave_reason(caught)
        if self.ranks.all_ok(error is None):
            return
        reason = self._reason(error)
        self.ranks.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(self.temp, ignore_errors=True)
        if error is not None and not isinstance(error, _EXPECTED):
            raise error
        raise TrainingError(f"saving {self.name} in {self.root} failed on {reason}") from error

    def prepare(self, state: Mapping[str, Any]) -> None:
        if self.step < 0:
            raise ConfigError("the step of a checkpoint must not be negative", self.step)
        _check_keys(state, "the state")
        json.dumps(state)
        self.root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(self.root)
        if self.temp.exists():
            shutil.rmtree(self.temp)
        self.temp.mkdir()

    def write_rank(self, pieces: Sequence[Piece]) -> None:
        path = self.temp / f"rank_{self.ranks.rank:05d}.safetensors"
        keyed = {f"{piece.name}#{index}": piece for index, piece in enumerate(pieces)}
        tensors = unshared({key: piece.tensor.cpu() for key, piece in keyed.items()})
        safetensors.torch.save_file(tensors, path)
        path.chmod(self.temp.stat().st_mode & 0o666)  # safetensors makes it readable by its owner alone
        fsync(path)
        _compare(path, tensors)
        places = [piece.record(key) for key, piece in keyed.items()]
        part = {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "pieces": places}
        write_text(path.with_suffix(".json"), json.dumps(part))

    def merge(self, state: Mapping[str, Any]) -> None:
        ranks = [self._read_part(rank) for rank in range(self.ranks.world)]
        tensors = merge_records({part["file"]: part.pop("pieces") for part in ranks})
        manifest = {"schema": SCHEMA, "step": self.step, "world": self.ranks.world, "state": state}
        write_text(self.temp / "manifest.json", json.dumps({**manifest, "files": ranks, "tensors": tensors}))
        write_text(self.temp / "manifest.sha256", f"{sha256(self.temp / 'manifest.json')}  manifest.json\n")
        fsync(self.temp)

    def publish(self, keep: Retention) -> None:
        aside = self.root / f".{self.name}.old"
        if self.final.exists():
            os.rename(self.final, aside)
        os.rename(self.temp, self.final)
        fsync(self.root)
        write_text(self.root / ".latest.tmp", self.name + "\n")
        os.replace(self.root / ".latest.tmp", self.root / "latest")
        fsync(self.root)
        _remove(aside)
        for name in keep.doomed(in_order(steps(self.root), self.step)):
            doomed = self.root / f".{name}.tmp"  # a name that the next save clears if this one is killed
            with contextlib.suppress(OSError):
                os.rename(self.root / name, doomed)
            _remove(doomed)

    def _read_part(self, rank: int) -> dict[str, Any]:
        path = self.temp / f"rank_{rank:05d}.json"
        if not path.exists():
            raise ConfigError(f"{path.name} is missing; is the folder on a filesystem that all ranks share?")
        part = json.loads(read_bytes(path))
        check_file(self.temp, part["file"], part["bytes"], digest=None)
        path.unlink()
        return part

    def _leave_reason(self, error: Exception) -> None:
        with contextlib.suppress(OSError):
            (self.temp / f"rank_{self.ranks.rank:05d}.failed").write_text(f"rank {self.ranks.rank}: {error}")

    def _reason(self, error: Exception | None) -> str:
        reasons = []
        with contextlib.suppress(OSError):
            reasons = [path.read_text() for path in sorted(self.temp.glob("*.failed"))]
        return next(filter(None, reasons), f"rank {self.ranks.rank}: {error}" if error else "another rank")


def _compare(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise OSError unless the file holds these tensors, bit by bit."""
    with safe_open(path, framework="pt", device="cpu") as file:
        for key, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(key)), _bits(tensor)):
                raise OSError(f"{path} does not hold what was written: {key} differs when read back")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a 1-D contiguous tensor; one of a single element may have any stride, which ``view`` refuses."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _remove(folder: Path) -> None:
    """Remove what nobody needs, as far as it goes: another program may have it open."""
    if folder.exists():
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def _check_keys(value: object, where: str) -> None:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise ConfigError(f"a key in {where} of a checkpoint is not a string", repr(key))
        _check_keys(inner, f"{where}.{key}")


def _clear_leftovers(root: Path) -> None:
    """Undo what a killed save left: a replaced checkpoint goes back or away, unfinished folders go away."""
    for entry in list(root.iterdir()):
        match = LEFTOVER.fullmatch(entry.name)
        if match and match[2] == "old" and not (root / match[1]).exists():
            os.rename(entry, root / match[1])
        elif match:
            _remove(entry)
