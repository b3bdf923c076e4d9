"""Names and files of a folder of checkpoints: what writing and reading share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalowrank.errors import ConfigError

SCHEMA = 1
STEP = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"\.(step_\d{8,})\.(tmp|old)")
RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")


def read_latest(root: Path) -> str:
    """The name of the checkpoint that ``latest`` names; ConfigError if it is missing or damaged."""
    name = read_bytes(root / "latest").decode(errors="replace").strip()
    if not STEP.fullmatch(name):
        raise ConfigError(f"{root / 'latest'} is damaged: it does not name a checkpoint", repr(name[:40]))
    return name


def steps(root: Path) -> list[str]:
    """The names of the checkpoints in a folder, newest step first, those set aside included."""
    entries = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    names = {name.removeprefix(".").removesuffix(".old") for name in entries}
    return sorted(filter(STEP.fullmatch, names), key=number, reverse=True)


def number(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix("step_"))


def in_order(names: Sequence[str], newest: int) -> list[str]:
    """From this step down, then any later ones, which a run that went back to an earlier step has left."""
    return sorted(names, key=lambda name: (number(name) > newest, -number(name)))


def check_file(folder: Path, file: object, size: object, digest: object | None) -> None:
    """Raise ConfigError unless ``file`` is a rank's, of ``size`` bytes and, if given, this SHA-256."""
    if not isinstance(file, str) or not RANK_FILE.fullmatch(file):
        raise ConfigError(f"{folder / 'manifest.json'} names a file it must not", repr(file))
    path = folder / file
    with readable(path):
        if path.stat().st_size != size:
            raise ConfigError(f"{path} is damaged: wrong size in bytes", path.stat().st_size, size)
        if digest is not None and sha256(path) != digest:
            raise ConfigError(f"{path} is damaged: the hash does not match")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which ``path`` is read: what the system refuses is a ConfigError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; ConfigError if it cannot be read."""
    with readable(path):
        return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """Write a file and have it on disk."""
    path.write_text(text, encoding="utf-8")
    fsync(path)


def fsync(path: Path) -> None:
    """Have a file or the entries of a folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
