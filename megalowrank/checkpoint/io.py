"""Reading checkpoint folders. Only JSON, text and safetensors are read: never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalowrank.checkpoint.folder import (
    SCHEMA,
    STEP,
    check_file,
    in_order,
    number,
    read_bytes,
    read_latest,
    steps,
)  # fmt: skip
from megalowrank.checkpoint.pieces import Box, Flat, SavedPart, SavedTensor
from megalowrank.errors import ConfigError, nearest


class Checkpoint:
    """A saved checkpoint, open for reading. Not collective: any process may open and read one by itself.

    ``files`` has the size in bytes of the file of every rank that wrote it.
    """

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
            check_file(folder, file, size, digest if verify else None)
        self.files: dict[str, int] = {file: size for file, (size, _) in files.items()}
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
                folder = folder / read_latest(folder)
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
    names = steps(root)
    try:
        names = in_order(names, number(read_latest(root))) if names else []
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
    if not STEP.fullmatch(folder.name) and not (folder / "manifest.json").exists():
        raise ConfigError(f"{folder} is not a checkpoint: it has neither latest nor manifest.json")
    return folder


def _before(folder: Path) -> str | None:
    """The newest checkpoint before this one (of all, if this is a folder of them) that looks intact."""
    is_step = STEP.fullmatch(folder.name)
    root, limit = (folder.parent, number(folder.name)) if is_step else (folder, math.inf)
    for name in [name for name in steps(root) if number(name) < limit]:
        with contextlib.suppress(ConfigError):
            Checkpoint(_present(root / name), verify=False)
            return name
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    text, digest = read_bytes(path), read_bytes(path.with_suffix(".sha256"))
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
