"""Labelled text: folders of JSON lines, folders of ``save_to_disk``, and tasks by their name on the hub.

A class is an integer, counted in the sorted order of the names that the training examples have; ``datasets`` may give
the order itself. Labels that are floats make a regression.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalowrank.data.hub import is_saved_dataset, reason
from megalowrank.errors import ConfigError

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
GLUE_ON_HUB = "nyu-mll/glue"
SPLIT_SEED = 0
_COLUMNS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("text", None), ("sentence", None),
)  # fmt: skip
_VALIDATION, _TENTH = "validation", 10

Label = str | int | float


@dataclass(frozen=True)
class Example:
    """A text or two, and its class (or, in a regression, its value)."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class LabelledData:
    """A task: ``labels`` are the names of its classes in order, None for a regression.

    ``validation`` has one set or several by name, the first is the main one; ``test`` may be empty. ``notes`` are
    lines that the user should see.
    """

    name: str
    labels: tuple[str, ...] | None
    train: list[Example]
    validation: dict[str, list[Example]]
    test: list[Example]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Raw:
    """An example whose label is as it stands in ``place``."""

    text: str
    pair: str | None
    label: Label
    place: str


def load_labelled(where: str) -> LabelledData:
    """The task at ``where``: a folder, a GLUE task, or NAME or NAME:CONFIG on the hub.

    A folder has train.jsonl and validation.jsonl, test.jsonl or both (validation_NAME.jsonl for several sets), each
    line an object of text, label and perhaps text_pair; or it is one of ``save_to_disk``. Without a validation set
    the test set is taken, without that a seeded tenth of the training set; ``notes`` say so. Raises ConfigError, with
    file and line, for what is not of this form, and for a name that cannot be reached.
    """
    path = Path(where)
    if path.is_dir() and not is_saved_dataset(path):
        splits, given = {name: list(_lines(file)) for name, file in _files(path).items()}, None
        name = path.absolute().name
    else:
        name, splits, given = _from_datasets(where)
    if not splits.get("train"):
        raise ConfigError(f"{where} has no training examples", None, "train.jsonl, or a split called train")
    return _assembled(name, splits, given)


def is_validation(split: str) -> bool:
    """Whether a split, or a file without its ending, is a set to evaluate on."""
    return split == _VALIDATION or split.startswith(f"{_VALIDATION}_")


def _assembled(name: str, splits: dict[str, list[_Raw]], given: tuple[str, ...] | None) -> LabelledData:
    """Classes counted, sets that are missing replaced."""
    labels = _classes(splits, given)
    sets = {split: [_example(raw, labels) for raw in rows] for split, rows in splits.items() if rows}
    train, test = sets["train"], sets.get("test", [])
    validation = {split: rows for split, rows in sets.items() if is_validation(split)}
    notes: list[str] = []
    if not validation and test:
        validation = {"test": test}
        notes.append(f"{name} has no validation set: it is evaluated on its test set")
    elif not validation:
        order = list(range(len(train)))
        random.Random(SPLIT_SEED).shuffle(order)
        held = set(order[: max(1, len(train) // _TENTH)])
        validation = {_VALIDATION: [row for number, row in enumerate(train) if number in held]}
        train = [row for number, row in enumerate(train) if number not in held]
        notes.append(f"{name} has no validation set: {len(held)} of the training examples are held out (a tenth)")
    if not train:
        raise ConfigError(f"{name} has too few examples", 1, "2 or more, or a validation set")
    return LabelledData(name, labels, train, validation, test, tuple(notes))


def _classes(splits: dict[str, list[_Raw]], given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of the classes in order; None for a regression. All labels are of one kind."""
    if given is not None:
        return given
    rows = [raw for split in splits.values() for raw in split]
    kinds = {type(raw.label) for raw in rows}
    if str in kinds and len(kinds) > 1:
        odd = next(raw for raw in rows if isinstance(raw.label, str) != isinstance(rows[0].label, str))
        raise ConfigError(f"{odd.place}: names and numbers are mixed as labels", repr(odd.label)[:40], "one kind")
    if float in kinds:
        return None
    found = tuple(map(str, sorted({raw.label for raw in splits["train"]})))  # type: ignore[type-var]
    if len(found) < 2:
        raise ConfigError(f"{splits['train'][0].place}: there is one class only", found[0][:40], "2 or more")
    return found


def _example(raw: _Raw, labels: tuple[str, ...] | None) -> Example:
    if labels is None:
        return Example(raw.text, raw.pair, float(raw.label))
    if str(raw.label) not in labels:
        allowed = ", ".join(labels)[:200]
        raise ConfigError(f"{raw.place}: the label is none of the training set", repr(raw.label)[:40], allowed)
    return Example(raw.text, raw.pair, labels.index(str(raw.label)))


def _files(folder: Path) -> dict[str, Path]:
    """The JSON lines of a folder by split; ConfigError if there are none to train on."""
    found = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    wanted = {name: file for name, file in found.items() if name in ("train", "test") or is_validation(name)}
    if "train" not in wanted:
        raise ConfigError(f"{folder} has no train.jsonl", ", ".join(found)[:80] or None, "train and validation.jsonl")
    return wanted


def _lines(file: Path) -> Iterator[_Raw]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}", error.strerror) from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield _checked(_object(line, f"{file}:{number}"), ("text", "text_pair"), f"{file}:{number}")


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON", str(error)[:100]) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{place}: not a JSON object", type(found).__name__)
    return found


def _checked(row: dict[str, Any], columns: tuple[str, str | None], place: str) -> _Raw:
    """A row as an example; ConfigError unless its texts have text and its label is a name or a number."""
    first, second = columns
    pair = None if second is None or row.get(second) is None else _text(row, second, place)
    label = row.get("label")
    odd = isinstance(label, bool) or label == "" or (isinstance(label, float) and not math.isfinite(label))
    if odd or not isinstance(label, (str, int, float)):
        raise ConfigError(f"{place}: label is not usable", repr(label)[:40], "a name, an integer or a finite float")
    return _Raw(_text(row, first, place), pair, label, place)


def _text(row: dict[str, Any], column: str, place: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{place}: {column} is not a text", repr(text)[:40], "a string that is not blank")
    return text


def _from_datasets(where: str) -> tuple[str, dict[str, list[_Raw]], tuple[str, ...] | None]:
    """Name, splits and classes of a folder of ``save_to_disk`` or of a name on the hub."""
    data = _opened(where)
    found, labels = {}, None
    for split, table in data.items():
        if split not in ("train", "test") and not is_validation(split):
            continue
        labels = getattr(table.features.get("label"), "names", None) or labels
        found[split] = list(_rows(table, f"{where}, {split}"))
    if all(raw.label == -1 for raw in found.get("test", ())):  # the answers are kept secret
        found.pop("test", None)
    if labels is not None:
        found = {split: [_named(raw, labels) for raw in rows] for split, rows in found.items()}
    name = Path(where).absolute().name if Path(where).is_dir() else where
    return name, found, None if labels is None else tuple(labels)


def _named(raw: _Raw, labels: list[str]) -> _Raw:
    if not isinstance(raw.label, int) or not 0 <= raw.label < len(labels):
        raise ConfigError(f"{raw.place}: label is no class", raw.label, f"0 to {len(labels) - 1}")
    return dataclasses.replace(raw, label=labels[raw.label])


def _opened(where: str) -> dict[str, Any]:
    """The splits of ``datasets`` by name."""
    import datasets

    saved, (name, _, config) = is_saved_dataset(where), where.partition(":")
    if Path(where).exists() and not saved:
        raise ConfigError("--labelled-data is no task", where, "a folder with train.jsonl, or one of save_to_disk")
    if where in GLUE:
        name, config = GLUE_ON_HUB, where
    try:
        found = datasets.load_from_disk(where) if saved else datasets.load_dataset(name, config or None)
    except Exception as error:  # broken folders, unknown names and missing networks each raise something else
        allowed = f"a folder of examples, {', '.join(GLUE)}, or NAME[:CONFIG] of a hub that can be reached"
        raise ConfigError(f"cannot read labelled data {where}", reason(error), allowed) from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _rows(table: Any, place: str) -> Iterable[_Raw]:
    names = table.column_names
    columns = next((pair for pair in _COLUMNS if all(column in names for column in pair if column)), None)
    if columns is None or "label" not in names:
        allowed = "label, and text or sentence, perhaps with a second text"
        raise ConfigError(f"{place} has other columns", ", ".join(names)[:100], allowed)
    for number, row in enumerate(table):
        yield _checked(row, columns, f"{place}, row {number}")
