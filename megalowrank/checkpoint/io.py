"""Checkpoint folders: one safetensors file per rank, a JSON manifest with hashes, and ``latest``.

A checkpoint is written beside its place and renamed into it when it is complete and on disk, so a run killed
at any moment leaves the one before it untouched. Only JSON, text and safetensors are read: never pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalowrank.checkpoint.pieces import Box, Flat, Piece, SavedPart, SavedTensor, merge_records, unshared
from megalowrank.errors import ConfigError, TrainingError, nearest

SCHEMA = 1
_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(step_\d{8,})\.(tmp|old)")
_EXPECTED = (OSError, RuntimeError, ConfigError, SafetensorError)
_RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")


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


def save_checkpoint(
    root: Path, step: int, pieces: Sequence[Piece], state: Mapping[str, Any], ranks: Ranks, keep_last: int = 0
) -> Path:
    """Save ``root/step_XXXXXXXX``, then name it in ``root/latest``; returns its path.

    Collective: every rank calls it with its own pieces; together they must hold every element of each tensor
    exactly once, so one rank alone gives a replicated tensor. ``state`` is JSON data (string keys; tuples
    come back as lists), taken from rank 0. A checkpoint of the same step is replaced. With ``keep_last`` > 0
    the steps beyond the newest ``keep_last`` are removed at the end, never the one just saved. All ranks must
    share the filesystem of ``root``, and one job alone may save into it. Raises TrainingError on every rank
    if any rank cannot do its part; the checkpoints there were stay as they were.
    """
    saving = _Saving(Path(root), step, ranks)
    saving.together(lambda: saving.prepare(state), only_first=True)
    saving.together(lambda: saving.write_rank(pieces))
    saving.together(lambda: saving.merge(state), only_first=True)
    saving.together(lambda: saving.publish(keep_last), only_first=True)
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
        self.temp.mkdir()

    def write_rank(self, pieces: Sequence[Piece]) -> None:
        path = self.temp / f"rank_{self.ranks.rank:05d}.safetensors"
        keyed = {f"{piece.name}#{index}": piece for index, piece in enumerate(pieces)}
        safetensors.torch.save_file(unshared({key: piece.tensor.cpu() for key, piece in keyed.items()}), path)
        path.chmod(self.temp.stat().st_mode & 0o666)  # safetensors makes it readable by its owner alone
        _fsync(path)
        places = [piece.record(key) for key, piece in keyed.items()]
        part = {"file": path.name, "sha256": _sha256(path), "bytes": path.stat().st_size, "pieces": places}
        _write(path.with_suffix(".json"), json.dumps(part))

    def merge(self, state: Mapping[str, Any]) -> None:
        ranks = [self._read_part(rank) for rank in range(self.ranks.world)]
        tensors = merge_records({part["file"]: part.pop("pieces") for part in ranks})
        manifest = {"schema": SCHEMA, "step": self.step, "world": self.ranks.world, "state": state}
        _write(self.temp / "manifest.json", json.dumps({**manifest, "files": ranks, "tensors": tensors}))
        _write(self.temp / "manifest.sha256", f"{_sha256(self.temp / 'manifest.json')}  manifest.json\n")
        _fsync(self.temp)

    def publish(self, keep_last: int) -> None:
        aside = self.root / f".{self.name}.old"
        if self.final.exists():
            os.rename(self.final, aside)
        os.rename(self.temp, self.final)
        _fsync(self.root)
        _write(self.root / ".latest.tmp", self.name + "\n")
        os.replace(self.root / ".latest.tmp", self.root / "latest")
        _fsync(self.root)
        if aside.exists():
            shutil.rmtree(aside)
        for name in _in_order(_steps(self.root), self.step)[keep_last:] if keep_last > 0 else []:
            doomed = self.root / f".{name}.tmp"  # a name that the next save clears if this one is killed
            os.rename(self.root / name, doomed)
            shutil.rmtree(doomed)

    def _read_part(self, rank: int) -> dict[str, Any]:
        path = self.temp / f"rank_{rank:05d}.json"
        if not path.exists():
            raise ConfigError(f"{path.name} is missing; is the folder on a filesystem that all ranks share?")
        part = json.loads(_read(path))
        _check_file(self.temp, part["file"], part["bytes"], digest=None)
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


class Checkpoint:
    """A saved checkpoint, open for reading. Not collective: any process may open and read one by itself."""

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Open this very folder; users call ``open``."""
        self.path, path = folder, folder / "manifest.json"
        self._handles: dict[str, Any] = {}
        manifest = _read_manifest(path)
        try:
            self.step: int = operator.index(manifest["step"])
            self.state: dict[str, Any] = dict(manifest["state"])
            self._tensors = {name: SavedTensor.parse(name, it) for name, it in manifest["tensors"].items()}
            files = {saved["file"]: (saved["bytes"], saved["sha256"]) for saved in manifest["files"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a checkpoint manifest", repr(error)) from None
        for file, (size, digest) in files.items():
            _check_file(folder, file, size, digest if verify else None)
        strange = {part.file for saved in self._tensors.values() for part in saved.parts} - files.keys()
        if strange:
            raise ConfigError(f"{path} names files that are not in its list", sorted(strange))

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Checkpoint:
        """Open a checkpoint folder, or the checkpoint that ``latest`` names in a folder of checkpoints.

        Checks the schema, the manifest's hash, all file sizes and with ``verify`` their SHA-256 (reads them
        whole). Raises ConfigError naming what is wrong and, if any, the one before it that looks intact.
        """
        folder = Path(path).absolute()
        try:
            if (folder / "latest").exists():
                folder = folder / _read_latest(folder)
            return cls(_present(folder), verify)
        except ConfigError as error:
            before = _before(folder)
            if before is None:
                raise
            raise ConfigError(f"{error}; the one before is {before}") from None

    def names(self) -> list[str]:
        """The logical names of the tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor; ConfigError if there is none of that name."""
        return self._saved(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The saved type of a tensor; ConfigError if there is none of that name."""
        return self._saved(name).dtype

    def read(self, name: str, box: Box | None = None, flat: Flat | None = None) -> Tensor:
        """The elements ``flat`` of ``box`` of a tensor (default: all), 1-D, in the saved type, on the CPU.

        Reads only the stretches of the files that hold them, whatever parts they were saved in. Raises
        ConfigError for an unknown name, a box outside the shape, a damaged file or missing elements.
        """
        return self._saved(name).read(self._load, box, flat)

    def _saved(self, name: str) -> SavedTensor:
        if name not in self._tensors:
            raise ConfigError(f"{self.path} has no tensor {name}", allowed=nearest(name, self._tensors))
        return self._tensors[name]

    def _load(self, part: SavedPart, start: int, stop: int) -> Tensor:
        path = self.path / part.file
        try:
            if part.file not in self._handles:
                self._handles[part.file] = safe_open(path, framework="pt", device="cpu")
            stored = self._handles[part.file].get_slice(part.key)
            if list(stored.get_shape()) == [part.flat[1] - part.flat[0]]:
                return stored[start:stop]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        raise ConfigError(f"{part.key} in {path} is not what the manifest says")


def find_auto(root: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint to resume from, fully verified, and why others tried before it were refused.

    First the one ``latest`` names, then the steps before it from the newest, then any after it (left by a
    run that went back). The path is None if ``root`` does not exist or holds none that is intact. Not
    collective, and reads whole files: call it on one rank and share the answer.
    """
    root = Path(root).absolute()
    refused: list[str] = []
    names = _steps(root)
    try:
        names = _in_order(names, _number(_read_latest(root))) if names else []
    except ConfigError as error:
        refused.append(str(error))
    for name in names:
        try:
            Checkpoint(_present(root / name))
            return root / name, tuple(refused)
        except ConfigError as error:
            refused.append(str(error))
    return None, tuple(refused)


def _present(folder: Path) -> Path:
    """The checkpoint folder, or its copy set aside if a save that was replacing it was killed halfway."""
    if not folder.exists() and (aside := folder.with_name(f".{folder.name}.old")).exists():
        return aside
    if not folder.is_dir():
        raise ConfigError(f"there is no checkpoint folder {folder}")
    if not _STEP.fullmatch(folder.name) and not (folder / "manifest.json").exists():
        raise ConfigError(f"{folder} is not a checkpoint: it has neither latest nor manifest.json")
    return folder


def _before(folder: Path) -> str | None:
    """The newest checkpoint before this one (of all, if this is a folder of them) that looks intact."""
    is_step = _STEP.fullmatch(folder.name)
    root, limit = (folder.parent, _number(folder.name)) if is_step else (folder, math.inf)
    for name in [name for name in _steps(root) if _number(name) < limit]:
        with contextlib.suppress(ConfigError):
            Checkpoint(_present(root / name), verify=False)
            return name
    return None


def _read_latest(root: Path) -> str:
    name = _read(root / "latest").decode(errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise ConfigError(f"{root / 'latest'} is damaged: it does not name a checkpoint", repr(name[:40]))
    return name


def _read_manifest(path: Path) -> dict[str, Any]:
    text, digest = _read(path), _read(path.with_suffix(".sha256"))
    if digest.split()[:1] != [hashlib.sha256(text).hexdigest().encode()]:
        raise ConfigError(f"{path} or manifest.sha256 beside it is damaged: the hash does not match")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not JSON") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"{path} has a schema this version does not read", schema, SCHEMA)
    return manifest


def _check_file(folder: Path, file: object, size: object, digest: object | None) -> None:
    if not isinstance(file, str) or not _RANK_FILE.fullmatch(file):
        raise ConfigError(f"{folder / 'manifest.json'} names a file it must not", repr(file))
    path = folder / file
    with _readable(path):
        if path.stat().st_size != size:
            raise ConfigError(f"{path} is damaged: wrong size in bytes", path.stat().st_size, size)
        if digest is not None and _sha256(path) != digest:
            raise ConfigError(f"{path} is damaged: the hash does not match")


def _check_keys(value: object, where: str) -> None:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise ConfigError(f"a key in {where} of a checkpoint is not a string", repr(key))
        _check_keys(inner, f"{where}.{key}")


def _steps(root: Path) -> list[str]:
    """The names of the checkpoints in a folder, newest step first, those set aside included."""
    entries = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    names = {name.removeprefix(".").removesuffix(".old") for name in entries}
    return sorted(filter(_STEP.fullmatch, names), key=_number, reverse=True)


def _number(name: str) -> int:
    return int(name.removeprefix("step_"))


def _in_order(names: Sequence[str], newest: int) -> list[str]:
    """From this step down, then any later ones, which a run that went back to an earlier step has left."""
    return sorted(names, key=lambda name: (_number(name) > newest, -_number(name)))


def _clear_leftovers(root: Path) -> None:
    """Undo what a killed save left: a replaced checkpoint goes back or away, unfinished folders go away."""
    for entry in list(root.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and match[2] == "old" and not (root / match[1]).exists():
            os.rename(entry, root / match[1])
        elif match:
            shutil.rmtree(entry)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _read(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
