"""Labelled data: files, folders of datasets, classes, sets that are missing, and every bad line by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megalowrank.data.labelled import GLUE, Example, load_labelled
from megalowrank.errors import ConfigError

ROWS = [{"text": f"t {n}", "label": ("no", "yes")[n % 2]} for n in range(40)]


def write(folder: Path, **splits: list[Any]) -> str:
    """One JSON object a line; text is written as it is."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_files(tmp_path: Path) -> None:
    pair = {"text": "é", "text_pair": "b", "label": "maybe"}
    where = write(tmp_path / "task", train=[*ROWS, pair, ""], validation_a=ROWS[:3], validation_b=[pair], test=ROWS[3:])
    data = load_labelled(where)
    assert (data.name, data.labels, len(data.train), len(data.test)) == ("task", ("maybe", "no", "yes"), 41, 37)
    assert {name: len(rows) for name, rows in data.validation.items()} == {"validation_a": 3, "validation_b": 1}
    assert data.train[1] == Example("t 1", None, 2) and data.train[40] == Example("é", "b", 0) and not data.notes


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [([10, 9, 9], ("9", "10"), [1, 0, 0]), ([1, 2.5, -3], None, [1.0, 2.5, -3.0]), (["b", "a", "a"], ("a", "b"), None)],
)
def test_kinds_of_labels(labels: list[Any], names: Any, found: Any, tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    data = load_labelled(write(tmp_path, train=rows, test=rows))
    assert data.labels == names and [row.label for row in data.train] == (found or [1, 0, 0])
    assert data.validation == {"test": data.test} and "evaluated on its test set" in data.notes[0]


def test_a_tenth_is_held_out_always_the_same(tmp_path: Path) -> None:
    data, again = (load_labelled(write(tmp_path, train=ROWS)) for _ in range(2))
    assert data == again and "4 of the training examples" in data.notes[0]
    texts = [row.text for row in (*data.train, *data.validation["validation"])]
    assert sorted(texts) == sorted(row["text"] for row in ROWS) and len(data.validation["validation"]) == 4
    assert [row.text for row in data.validation["validation"]] != [row["text"] for row in ROWS[:4]]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", "train.jsonl:3 JSON"), ("[1]", "train.jsonl:3 object list"), ("\ud800", "train.jsonl:3 JSON"),
        ({"label": 1}, "train.jsonl:3 text None"), ({"text": " ", "label": 1}, "train.jsonl:3 text blank"),
        ({"text": 7, "label": 1}, "train.jsonl:3 text 7"), ({"text": "x"}, "train.jsonl:3 label None"),
        ({"text": "x", "text_pair": "", "label": 1}, "train.jsonl:3 text_pair"),
        ({"text": "x", "label": True}, "train.jsonl:3 label True"), ({"text": "x", "label": ""}, "train.jsonl:3 label"),
        ('{"text": "x", "label": NaN}', "train.jsonl:3 label nan"), ({"text": "x", "label": 1}, "train.jsonl:3 mixed"),
        ({"text": "x", "label": [1]}, "train.jsonl:3 label [1]"),
    ],
)  # fmt: skip
def test_bad_lines(line: Any, parts: str, tmp_path: Path) -> None:
    folder = Path(write(tmp_path, train=ROWS[:2]))
    text = line if isinstance(line, str) else json.dumps(line)
    with (folder / "train.jsonl").open("ab") as stream:
        stream.write(text.encode(errors="surrogatepass") + b"\n")
    with pytest.raises(ConfigError) as caught:
        load_labelled(str(folder))
    assert all(part in str(caught.value) for part in parts.split()), caught.value


def test_what_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {
        str(tmp_path / "empty"): "has no train.jsonl",
        str(tmp_path / "file"): "is no task",
        write(tmp_path / "none", train=[""]): "no training examples",
        write(tmp_path / "one", train=ROWS[:1], test=ROWS[:1]): "one class only",
        write(tmp_path / "odd", train=ROWS, test=[{"text": "x", "label": "other"}]): "none of the training set",
        write(tmp_path / "few", train=[{"text": "x", "label": 1.5}]): "too few examples",
    }
    for where, what in cases.items():
        with pytest.raises(ConfigError, match=what):
            load_labelled(where)


def test_folders_of_datasets(tmp_path: Path) -> None:
    """Classes have the order of the features; labels that are kept secret are no test set."""
    features = datasets.Features(
        {"question": datasets.Value("string"), "sentence": datasets.Value("string"), "idx": datasets.Value("int32"),
         "label": datasets.ClassLabel(names=["yes", "no"])}
    )  # fmt: skip

    def table(labels: list[int]) -> datasets.Dataset:
        rows = {"question": ["q"] * len(labels), "sentence": ["s"] * len(labels), "idx": [0] * len(labels)}
        return datasets.Dataset.from_dict({**rows, "label": labels}, features=features)

    splits = {"train": table([0, 1, 1]), "validation_x": table([1]), "test": table([-1, -1]), "more": table([0])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))
    data = load_labelled(str(tmp_path / "dict"))
    assert (data.name, data.labels, data.test) == ("dict", ("yes", "no"), [])
    assert data.train == [Example("q", "s", 0), Example("q", "s", 1), Example("q", "s", 1)]
    assert data.validation == {"validation_x": [Example("q", "s", 1)]}
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0.5, 2.0]}).save_to_disk(str(tmp_path / "one"))
    assert load_labelled(str(tmp_path / "one")).labels is None
    datasets.Dataset.from_dict({"words": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "odd"))
    table([0, -1]).save_to_disk(str(tmp_path / "hidden"))
    for name, what in (("odd", "has other columns; got words, label"), ("hidden", "row 1: label is no class; got -1")):
        with pytest.raises(ConfigError, match=what):
            load_labelled(str(tmp_path / name))


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> Any:
        asked.append((name, config))
        if name == "gone":
            raise ConnectionError("no\nroute")
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"sentence": ["a", "b"] * 5, "label": [0, 1] * 5}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_labelled("cola").name == "cola" and load_labelled("who/what:part").labels == ("0", "1")
    assert asked == [("nyu-mll/glue", "cola"), ("who/what", "part")] and len(GLUE) == 9
    with pytest.raises(ConfigError, match="cannot read labelled data gone; got ConnectionError: no route"):
        load_labelled("gone")
