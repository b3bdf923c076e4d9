"""Sources: whatever the parts are, the documents are those of a plain reader, in order; bad content is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalowrank.data.hub import HubDataset, SavedDataset, is_saved_dataset
from megalowrank.data.sources import JsonLines, PlainText, Source, file_sources
from megalowrank.errors import ConfigError

TEXTS = ["plain", "", "two\nlines", "ünï 東京 🙂", "  blanks  ", 'quo"te\\', "x" * 3000, "\x00\x1f", "end\r\n"] * 5


def documents(source: Source, part_bytes: int) -> list[str]:
    return [text for part in source.parts(part_bytes) for text in source.read(part)]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    lines = [json.dumps({"id": n, key: text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(texts)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 2000, 10**9])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n \n"])
def test_json_lines_in_parts_of_any_size(tmp_path: Path, part_bytes: int, ending: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS) + ending)
    source = JsonLines(str(tmp_path / "x.jsonl"))
    parts = source.parts(part_bytes)
    assert documents(source, part_bytes) == TEXTS
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert sum(part.weight for part in parts) == (tmp_path / "x.jsonl").stat().st_size


def zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".gz": lambda path, content: path.write_bytes(gzip.compress(content[:50]) + gzip.compress(content[50:])),
    ".bz2": lambda path, content: path.write_bytes(bz2.compress(content)),
    ".xz": lambda path, content: path.write_bytes(lzma.compress(content)),
    ".zst": zst,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_compressed_files_are_one_part_and_damage_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.json{ending}"
    WRITERS[ending](path, jsonl(TEXTS * 50))
    [source] = file_sources(path, "text", "document")
    assert len(source.parts(10)) == 1 and documents(source, 10) == TEXTS * 50
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match="x.json"):
        documents(source, 10)


@pytest.mark.parametrize("part_bytes", [1, 5, 33, 400, 10**9])
def test_plain_text_by_lines_paragraphs_and_files(tmp_path: Path, part_bytes: int) -> None:
    text = "\n\nfirst line\nsecond\n\n \t\n\nnext ü\n\nx\ny\nz\n \nlast" + "\n\n" + "long " * 200 + "\nend"
    path = tmp_path / "x.txt"
    path.write_text(text)
    paragraphs = ["first line\nsecond", "next ü", "x\ny\nz", "last", "long " * 200 + "\nend"]
    assert documents(PlainText(str(path), "paragraph"), part_bytes) == paragraphs
    lines = [line for line in text.split("\n") if line.strip()]
    assert documents(PlainText(str(path), "line"), part_bytes) == lines
    assert documents(PlainText(str(path), "document"), part_bytes) == [text]


@pytest.mark.parametrize("part_bytes", [1, 3000, 10**9])
def test_parquet(tmp_path: Path, part_bytes: int) -> None:
    table = pyarrow.table({"body": TEXTS, "n": range(len(TEXTS))})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    [source] = file_sources(tmp_path / "x.parquet", "body", "document")
    assert documents(source, part_bytes) == TEXTS
    [source] = file_sources(tmp_path / "x.parquet", "text", "document")
    with pytest.raises(ConfigError, match="no column text.*body"):
        source.parts(10)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(ConfigError, match="bad.parquet"):
        file_sources(tmp_path / "bad.parquet", "text", "document")[0].parts(10)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ConfigError, match="no text in text"):
        documents(file_sources(tmp_path / "null.parquet", "text", "document")[0], 10)


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress(jsonl(["third"])))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "aa.jsonl").write_bytes(jsonl(["second"]))
    (tmp_path / "readme.rst").write_text("no")
    found = file_sources(tmp_path, "text", "document")
    assert [text for source in found for text in documents(source, 100)] == ["first", "second", "third"]


def test_datasets_folders(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(str(tmp_path / "many"))
    assert is_saved_dataset(tmp_path / "one") and is_saved_dataset(tmp_path / "many") and not is_saved_dataset(tmp_path)
    for part_bytes in (1, 300, 10**9):
        assert documents(SavedDataset(str(tmp_path / "one")), part_bytes) == TEXTS
    assert documents(SavedDataset(str(tmp_path / "many"), split="test"), 100) == TEXTS[:3]
    described = SavedDataset(str(tmp_path / "one")).describe()
    assert described["rows"] == len(TEXTS) and described == SavedDataset(str(tmp_path / "one")).describe()
    for source, message in (
        (SavedDataset(str(tmp_path / "many"), split="dev"), "no split dev.*train or test"),
        (SavedDataset(str(tmp_path / "one"), key="body"), "no column body"),
        (SavedDataset(str(tmp_path)), "cannot read"),
    ):
        with pytest.raises(ConfigError, match=message):
            source.parts(10)


def test_streamed_datasets_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that streams from the hub, on a folder that load_dataset takes in the same way."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    pieces = np.array_split(np.arange(len(TEXTS)), 4)
    for number, piece in enumerate(pieces):
        (folder / f"train-{number}.jsonl.gz").write_bytes(gzip.compress(jsonl([TEXTS[i] for i in piece])))
    source = HubDataset.pin(str(folder), None, "train", None, "text")
    assert [(part.start, part.stop) for part in source.parts(10)] == [(n, n + 1) for n in range(4)]
    assert documents(source, 10) == TEXTS
    assert source.describe()["files"] == 4 and len(source.state()) == 4
    for changed in (HubDataset(str(folder), None, "dev", None), HubDataset(str(folder), "en", "train", None)):
        with pytest.raises(ConfigError, match="cannot open the dataset"):
            changed.parts(10)
    with pytest.raises(ConfigError, match="no body"):
        documents(HubDataset(str(folder), None, "train", None, "body"), 10)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(self: object, name: str, revision: str | None, timeout: float) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(ConfigError, match="allenai/c4 on the hub.*no route to host"):
        HubDataset.pin("allenai/c4", "en", "train", None, "text")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "byte 14, is not JSON"),
        (b"[1]", "is no object; got list"),
        (b'"text"', "is no object"),
        (b'{"body": "x"}', "has no text; got keys body"),
        (b'{"text": 5}', "no text in text; got int"),
        (b'{"text": null}', "got NoneType"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 24"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_bad_json_lines_are_named_by_place(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=message) as caught:
        documents(JsonLines(str(path)), 10**6)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_names_that_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.parquet.gz").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name in ("x.csv", "x.parquet.gz", "empty", "absent.jsonl"):
        with pytest.raises(ConfigError, match=name):
            file_sources(tmp_path / name, "text", "document")
