"""Hugging Face datasets: folders of ``save_to_disk``, and names on the hub, which are streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalowrank.data.sources import Part, checked_text
from megalowrank.errors import ConfigError

_ROWS = 256


def is_saved_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file()


@dataclass(frozen=True)
class SavedDataset:
    """A folder of ``save_to_disk``; of several splits, ``split`` is read."""

    path: str
    split: str = "train"
    key: str = "text"

    def describe(self) -> dict[str, Any]:
        """Path, rows, and the fingerprint that datasets gives to the content."""
        data = self._open()
        return {"kind": "SavedDataset", **vars(self), "rows": len(data), "fingerprint": data._fingerprint}

    def state(self) -> None:
        """Nothing: the fingerprint says it."""

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of rows."""
        data = self._open()
        per_row = max(1, data.data.nbytes // max(1, len(data)))
        step = max(1, part_bytes // per_row)
        edges = [(start, min(start + step, len(data))) for start in range(0, len(data), step)]
        return [Part(start, stop, (stop - start) * per_row) for start, stop in edges]

    def read(self, part: Part) -> Iterator[str]:
        """The texts of a range of rows."""
        rows = self._open().select_columns([self.key]).select(range(part.start, part.stop))
        for number, row in enumerate(rows, part.start):
            yield checked_text(row, self.key, f"{self.path}, row {number},")

    def _open(self) -> Any:
        import datasets

        try:
            data = datasets.load_from_disk(self.path)
        except Exception as error:  # broken folders surface as anything, from KeyError to ArrowInvalid
            raise ConfigError(f"cannot read {self.path}", reason(error), "a folder of save_to_disk") from None
        if isinstance(data, datasets.DatasetDict):
            if self.split not in data:
                raise ConfigError(
                    f"{self.path} has no split {self.split}", None, f"--dataset-split {' or '.join(data)}"
                )
            data = data[self.split]
        if self.key not in data.column_names:
            raise ConfigError(f"{self.path} has no column {self.key}", None, ", ".join(data.column_names))
        return data


@dataclass(frozen=True)
class HubDataset:
    """A dataset by its name on the hub (or a folder that ``load_dataset`` takes), streamed file by file.

    ``revision`` is a commit, so that a run and its continuation read the same; see ``pin``. Code that comes
    with a dataset is never run. A part is one file of the dataset.
    """

    name: str
    config: str | None
    split: str
    revision: str | None
    key: str = "text"

    @classmethod
    def pin(cls, name: str, config: str | None, split: str, revision: str | None, key: str) -> HubDataset:
        """The dataset as it is now: the commit is asked from the hub. ConfigError if there is no answer."""
        if Path(name).exists():
            return cls(name, config, split, None, key)
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(name, revision=revision, timeout=60).sha
        except Exception as error:  # without a network, anything from httpx or the hub's own errors
            raise ConfigError(f"cannot find the dataset {name} on the hub", reason(error)) from None
        return cls(name, config, split, commit, key)

    def describe(self) -> dict[str, Any]:
        """Name, configuration, split, commit, and the number of files."""
        return {"kind": "HubDataset", **vars(self), "files": self._open().num_shards}

    def state(self) -> list[list[Any]]:
        """Name, size and time of change of a local folder's files; of the hub's the commit says it."""
        files = sorted(file for file in Path(self.name).rglob("*") if file.is_file())
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def parts(self, part_bytes: int) -> list[Part]:
        """One part a file, whatever its size."""
        return [Part(number, number + 1, 1) for number in range(self._open().num_shards)]

    def read(self, part: Part) -> Iterator[str]:
        """The texts of a file."""
        data = self._open()
        rows = data.shard(num_shards=data.num_shards, index=part.start)
        place = f"dataset {self.name}, file {part.start},"
        try:
            for row in rows:
                yield checked_text(row, self.key, place)
        except ConfigError:
            raise
        except Exception as error:  # a stream that ends, a file that is not what it should be
            raise ConfigError(f"{place} cannot be read", reason(error), "run again: finished parts are kept") from None

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # unknown names, configurations and splits each raise something else
            allowed = "a dataset, --dataset-config and --dataset-split that exist"
            raise ConfigError(f"cannot open the dataset {self.name}", reason(error), allowed) from None


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
