"""Weights of a Hugging Face folder under our names. Only JSON and safetensors are read: never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalowrank.checkpoint.hf.names import Shape, Stored, names_of, stored_tensors
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def safetensors_files(folder: Path, stem: str) -> list[Path]:
    """``stem``.safetensors, or the files of its index; ConfigError if there are none, pickles named."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in _indexed(index)]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ConfigError(f"{folder} has its weights pickled, which is never read", pickles[0], single.name)
    raise ConfigError(f"{folder} has no weights", None, f"{single.name}, or {index.name} and its files")


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is not an index of safetensors", repr(error)[:100]) from None
    strange = [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]
    if strange:
        raise ConfigError(f"{index} names a file it must not", repr(strange[0]))
    return names


class SafetensorsFiles:
    """Tensors by their names in several files."""

    def __init__(self, paths: list[Path]) -> None:
        self._handles: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"cannot read {path}", " ".join(str(error).split())[:120]) from None
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._handles)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """A tensor in float32; ConfigError for another shape, or integers."""
        stored = self._handles[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ConfigError(f"{name} has another shape than config.json says", tuple(stored.get_shape()), shape)
        value = self._handles[name].get_tensor(name)
        if value.dtype not in _DTYPES:
            raise ConfigError(f"{name} is not stored as floating point", value.dtype, "weights that are not quantised")
        return value.float()


class FolderWeights:
    """The weights of a model of theirs by our logical names, read as they are asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """ConfigError for pickles, and for tensors that are missing or that nobody knows."""
        self._files = SafetensorsFiles(safetensors_files(folder, "model"))
        names = names_of(config)
        self._stored = {part: stored for stored in stored_tensors(config) for part in stored.parts}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        heads = {"lm_head.weight", f"{names.outer['output']}.weight"}
        self._keys: dict[str, str] = {}
        for key in self._files.names():
            if key.endswith(names.buffers):
                continue
            known = key if key.startswith(names.prefix) or key in heads else names.prefix + key
            self._keys[f"{names.outer['output']}.weight" if known in heads else known] = key
        self._check(folder, f"{names.outer['output']}.weight")

    def _check(self, folder: Path, head: str) -> None:
        wanted = {stored.name for stored in self._stored.values()}
        if head in self._keys and head not in wanted:
            self._check_tied(folder, self._keys.pop(head))
        for problem, names in (("lacks", wanted - self._keys.keys()), ("has a surplus", self._keys.keys() - wanted)):
            if names:
                raise ConfigError(f"{folder} {problem} tensor {sorted(names)[0]}", f"{len(names)} such tensors")

    def _check_tied(self, folder: Path, key: str) -> None:
        """Older files repeat the embedding as the head that it is tied to."""
        table = self._stored["embedding.weight"]
        if not torch.equal(self._files.read(key, table.shape), self._files.read(self._keys[table.name], table.shape)):
            raise ConfigError(f"{key} in {folder} differs from the embedding that config.json ties it to")

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """The logical tensor ``name`` in float32; ConfigError if its shape is not ``shape``."""
        stored = self._stored[name]
        if self._last[0] != stored.name:
            self._last = stored.name, self._parts(stored)
        value = self._last[1][name]
        if tuple(value.shape) != tuple(shape):
            raise ConfigError(f"{name} has another shape", tuple(value.shape), shape)
        return value

    def _parts(self, stored: Stored) -> dict[str, torch.Tensor]:
        value = self._files.read(self._keys[stored.name], stored.shape)
        return dict(zip(stored.parts, stored.split(value), strict=True))
