"""Movie-review snippets: the table inside an archive inside an archive, which is made here, and the tool."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import tarfile
from pathlib import Path

import pytest

from megalowrank.data.archive import Archive
from megalowrank.data.labelled import load_labelled
from megalowrank.data.reviews import REVIEWS, review_examples
from megalowrank.errors import ConfigError
from tests.harness import ROOT

ROWS = [f"{number}\t{(number % 9 - 4) / 2}\tSnippet {number}: caf\xe9\ttab " for number in range(90)]


def packed(name: str, content: bytes) -> bytes:
    """A compressed archive of one file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


def archive_of(folder: Path, table: str, name: str = "movieReviewSnippets_GroundTruth.txt") -> Archive:
    """A source package like the real one, in a cache folder."""
    folder.mkdir()
    whole = packed("x-1/more/hutto.tar.gz", packed(f"hutto/{name}", table.encode("latin-1")))
    (folder / "x-1.tar.gz").write_bytes(whole)
    return Archive("x", "1", hashlib.sha256(whole).hexdigest(), r"x-1/more/hutto\.tar\.gz")


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Means of 0 are left out: 80 snippets stay; half of the rest is positive."""
    archive = archive_of(tmp_path / "cache", "\r\n".join(ROWS) + "\n")
    spec = importlib.util.spec_from_file_location("prepare_reviews", ROOT / "tools" / "prepare_reviews.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "review_examples", lambda cache: review_examples(cache, archive))
    tool.prepare_reviews(tmp_path / "out", tmp_path / "cache")
    assert f"--labelled-data {tmp_path / 'out'}" in capsys.readouterr().out
    data = load_labelled(str(tmp_path / "out"))
    assert data.labels == ("negative", "positive") and (len(data.train), len(data.validation["validation"])) == (72, 8)
    found = {row.text: row.label for row in (*data.train, *data.validation["validation"])}
    expected = {f"Snippet {n}: café\ttab": int(n % 9 > 4) for n in range(90) if n % 9 != 4}
    assert found == expected and [row.text for row in data.train] != sorted(row.text for row in data.train)


def test_another_archive(tmp_path: Path) -> None:
    for number, (table, name, what) in enumerate(
        [("1\tx\ty", "movieReviewSnippets_GroundTruth.txt", "row 1 is no snippet"), ("", "other.txt", "holds no movie")]
    ):
        archive = archive_of(tmp_path / str(number), table, name)
        with pytest.raises(ConfigError, match=what):
            review_examples(tmp_path / str(number), archive)
    assert REVIEWS.filename == "vaderSentiment-3.3.2.tar.gz"
