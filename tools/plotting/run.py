"""A run folder as the plots read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalowrank.engine.metrics import read_metrics
from megalowrank.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """A run folder: its resolved configuration (run.json) and its records (metrics.jsonl).

    ``cut``: the last line was cut while it was written, and is not among the records.
    """

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    cut: bool = False

    @staticmethod
    def read(folder: Path) -> Run:
        """Raises ConfigError if the files are missing, damaged or without any update."""
        path = folder / "run.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is not JSON") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} is not the configuration of a run")
        records = read_metrics(folder / "metrics.jsonl")
        run = Run(folder, config, records, _is_cut(folder / "metrics.jsonl", len(records)))
        if not len(run.column("loss")[0]):
            raise ConfigError(f"{folder / 'metrics.jsonl'} has no update with a loss")
        return run

    def field(self, *names: str, kind: type | tuple[type, ...]) -> Any:
        """A value of run.json; ConfigError if it is missing or of another type."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.folder / 'run.json'} has no valid {'.'.join(names)}", repr(value))
        return value

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have a number called ``name``."""
        found = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), (int, float))]
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @property
    def method(self) -> str:
        """The method's name, or what stands there instead."""
        return str(self.config.get("method"))

    @property
    def title(self) -> str:
        """Method and size, for the head of a figure."""
        model = self.config.get("model")
        model = model if isinstance(model, dict) else {}
        size = model.get("preset") or f"{model.get('num_layers')} blocks of width {model.get('hidden_size')}"
        rank = self.config.get("method_config")
        rank = rank.get("lora_rank") if isinstance(rank, dict) else None
        return f"{self.config.get('method')}, {size}" + (f", r = {rank}" if rank else "")


def _is_cut(path: Path, records: int) -> bool:
    """Whether the file has one line more than ``records``."""
    return path.read_bytes().rstrip(b"\n").count(b"\n") + 1 > records
