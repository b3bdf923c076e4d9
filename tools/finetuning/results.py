"""What was measured: a file for every model, task and seed, and the table of their means and spreads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalowrank.data.files import write_whole
from megalowrank.errors import ConfigError

CELLS = "cells"
KINDS = {
    "last": "after the last epoch",
    "best": "best epoch of every seed by the first measure on the same validation set, which flatters",
}
_MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """A model, a task and a seed; its file holds the measures after every epoch by validation set."""

    model: str
    task: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, seed {self.seed}"

    def file(self, out: Path) -> Path:
        """Where it is kept."""
        return out / CELLS / f"{self.model}__{self.task.replace('/', '_').replace(':', '_')}__seed{self.seed}.json"


def read_cell(cell: Cell, out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished cell, None if it is not finished; ConfigError if it was made with other settings."""
    path = cell.file(out)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a finished cell", repr(error)[:100], "another --output, or none of it"
        ) from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} was made with other {name}", f"{value} now, {before.get(name)} before", "another --output"
            )
    return found["epochs"]


def write_cell(cell: Cell, out: Path, settings: dict[str, Any], epochs: dict[str, Any]) -> None:
    """Keep a finished cell; it is whole or not there."""
    text = json.dumps({"settings": settings, "epochs": epochs}, indent=1)
    write_whole(cell.file(out), f"{text}\n".encode())


def chosen(epochs: Sequence[dict[str, float]], kind: str) -> dict[str, float]:
    """The measures of the last epoch, or of the first that has the largest first measure."""
    first = next(iter(epochs[0]))
    return epochs[-1] if kind == "last" else max(epochs, key=lambda line: line[first])


def summary(cells: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds, one record for every model, task, validation set and measure."""
    found: dict[tuple[str, str, str, str], list[tuple[int, list[dict[str, float]]]]] = {}
    for cell, sets in cells.items():
        for number, (name, epochs) in enumerate(sets.items()):
            task = cell.task if not number else f"{cell.task} {name}"
            for measure in epochs[0]:
                found.setdefault((cell.model, cell.task, task, measure), []).append((cell.seed, epochs))
    return [_record(key, seeds) for key, seeds in found.items()]


def _record(key: tuple[str, str, str, str], seeds: list[tuple[int, list[dict[str, float]]]]) -> dict[str, Any]:
    model, _, task, measure = key
    record: dict[str, Any] = {"model": model, "task": task, "measure": measure, "seeds": [seed for seed, _ in seeds]}
    for kind in KINDS:
        values = [chosen(epochs, kind)[measure] for _, epochs in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else None
        record[kind] = {"mean": statistics.mean(values), "stdev": spread, "values": values}
    return record


def markdown(records: Sequence[dict[str, Any]], recipe: str) -> str:
    """A table for each of ``KINDS``: a row a model, a column a measure of a task."""
    places = [(record["task"], record["measure"]) for record in records if record["measure"] != "loss"]
    columns = list(dict.fromkeys(places))
    models = list(dict.fromkeys(record["model"] for record in records))
    by_place = {(record["model"], record["task"], record["measure"]): record for record in records}
    lines = [recipe]
    for kind, text in KINDS.items():
        lines += ["", f"Mean ± sample standard deviation over seeds, {text}:", ""]
        lines += _line(["model", *(f"{task} {measure}" for task, measure in columns)])
        lines += ["|" + "---|" * (1 + len(columns))]
        for model in models:
            lines += _line([model, *(_shown(by_place.get((model, *column)), kind) for column in columns)])
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _shown(record: dict[str, Any] | None, kind: str) -> str:
    if record is None:
        return _MISSING
    found, count = record[kind], len(record["seeds"])
    spread = "" if found["stdev"] is None else f" ± {found['stdev']:.4f}"
    return f"{found['mean']:.4f}{spread} ({count})"
