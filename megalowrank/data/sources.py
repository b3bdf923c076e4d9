"""Files that hold text: JSON lines, plain text and parquet, each cut into parts that are read on their own.

A part is a range of bytes (row groups of parquet) that begins and ends with a document, so that the parts
of a file, in order, give its documents in order, whoever reads them.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from megalowrank.errors import ConfigError

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
TEXT_ENDINGS = (".txt", ".text", ".md")
PARQUET_ENDINGS = (".parquet",)
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
SAMPLE_BY = ("document", "paragraph", "line")
_LONGEST = 1 << 30
_EDGE = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A range of a source; ``weight`` is its size in bytes of input, for progress."""

    start: int
    stop: int
    weight: int


class Source(Protocol):
    """Somewhere documents come from; instances travel to worker processes."""

    def describe(self) -> dict[str, Any]:
        """What goes into the manifest: name, kind and what identifies the content."""

    def state(self) -> Any:
        """What must not change between a run and its continuation, beyond ``describe``."""

    def parts(self, part_bytes: int) -> list[Part]:
        """The source cut into parts of about ``part_bytes`` of input."""

    def read(self, part: Part) -> Iterator[str]:
        """The documents of a part, in order; ConfigError for content that is not what it should be."""


@dataclass(frozen=True)
class FileSource:
    """What the sources that are one file have in common."""

    path: str

    def describe(self) -> dict[str, Any]:
        """Path, size, and the SHA-256 of size, first and last MiB."""
        size, digest = os.path.getsize(self.path), hashlib.sha256()
        digest.update(str(size).encode())
        with open(self.path, "rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
        return {"kind": type(self).__name__, **vars(self), "bytes": size, "edges_sha256": digest.hexdigest()}

    def state(self) -> int:
        """When the file was changed last, in nanoseconds."""
        return os.stat(self.path).st_mtime_ns


@dataclass(frozen=True)
class _Lines(FileSource):
    """A text file whose documents begin and end with lines. A compressed one is one part."""

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of bytes that begin where a document does."""
        size = os.path.getsize(self.path)
        if self.path.endswith(COMPRESSED_ENDINGS):
            return [Part(0, -1, size)]
        with open(self.path, "rb") as stream:
            cuts = [self._next_document(stream, offset) for offset in range(part_bytes, size, part_bytes)]
        edges = [0, *sorted({cut for cut in cuts if cut < size}), size]
        return [
            Part(start, stop, stop - start) for start, stop in zip(edges[:-1], edges[1:], strict=True) if start < stop
        ]

    def _next_document(self, stream: BinaryIO, offset: int) -> int:
        """Where the first document after byte ``offset`` begins."""
        stream.seek(offset - 1)
        self._line(stream, offset)
        return stream.tell()

    def _line(self, stream: BinaryIO, position: int) -> bytes:
        line = stream.readline(_LONGEST)
        if len(line) >= _LONGEST:
            raise ConfigError(f"{self.path} has a line too long at byte {position}", None, f"< {_LONGEST} bytes")
        return line

    def lines(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """Offset (in the text, not in a compressed file) and content of every line of a part."""
        position = part.start
        try:
            with _open(self.path) as stream:
                if position:
                    stream.seek(position)
                while (part.stop < 0 or position < part.stop) and (line := self._line(stream, position)):
                    yield position, line if position else line.removeprefix(_BYTE_ORDER_MARK)
                    position += len(line)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise ConfigError(f"cannot read {self.path} from byte {position} on", str(error)[:200]) from None

    def decode(self, content: bytes, position: int) -> str:
        """``content`` as text; ConfigError if it is not UTF-8."""
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not UTF-8 at byte {position + error.start}") from None


@dataclass(frozen=True)
class JsonLines(_Lines):
    """One JSON object a line, whose member ``key`` is the text. Blank lines are left out."""

    key: str = "text"

    def read(self, part: Part) -> Iterator[str]:
        """The texts of a part."""
        for position, line in self.lines(part):
            if line.strip():
                yield self._text(line, position)

    def _text(self, line: bytes, position: int) -> str:
        place = f"{self.path}, line at byte {position},"
        try:
            found = json.loads(self.decode(line, position))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON", getattr(error, "msg", type(error).__name__)) from None
        if not isinstance(found, dict):
            raise ConfigError(f"{place} is no object", type(found).__name__, f'{{"{self.key}": "..."}} on every line')
        return checked_text(found, self.key, place)


@dataclass(frozen=True)
class PlainText(_Lines):
    """Text whose documents are its lines, its paragraphs (between blank lines), or the whole file."""

    sample_by: str = "document"

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of bytes that begin where a document does."""
        if self.sample_by != "document":
            return super().parts(part_bytes)
        size = os.path.getsize(self.path)
        return [Part(0, -1, size)]

    def _next_document(self, stream: BinaryIO, offset: int) -> int:
        position = super()._next_document(stream, offset)
        while self.sample_by == "paragraph" and (line := self._line(stream, position)).strip():
            position += len(line)
        return stream.tell()

    def read(self, part: Part) -> Iterator[str]:
        """The documents of a part, without line ends and blank lines around them; a whole file as it is."""
        held: list[bytes] = []
        begun = size = 0
        for position, line in self.lines(part):
            begun = begun if held else position
            blank = not line.strip()
            if self.sample_by == "document" or not blank:
                held.append(line)
                size += len(line)
            if held and (self.sample_by == "line" or (blank and self.sample_by == "paragraph")):
                yield self.decode(b"".join(held), begun).strip("\r\n")
                held, size = [], 0
            if size > _LONGEST:
                allowed = f"<= {_LONGEST} bytes, or --sample-by paragraph or line"
                raise ConfigError(f"{self.path} has a document too long at byte {begun}", None, allowed)
        if held:
            text = self.decode(b"".join(held), begun)
            yield text if self.sample_by == "document" else text.strip("\r\n")


@dataclass(frozen=True)
class Parquet(FileSource):
    """A parquet file whose column ``key`` is the text."""

    key: str = "text"

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of row groups."""
        import pyarrow
        import pyarrow.parquet

        try:
            meta = pyarrow.parquet.read_metadata(self.path)
            names = meta.schema.to_arrow_schema().names
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"cannot read {self.path}", str(error)[:200]) from None
        if self.key not in names:
            raise ConfigError(
                f"{self.path} has no column {self.key}", None, f"--json-keys with one of {', '.join(names)}"
            )
        found, start, weight = [], 0, 0
        for group in range(meta.num_row_groups):
            weight += meta.row_group(group).total_byte_size
            if weight >= part_bytes or group + 1 == meta.num_row_groups:
                found.append(Part(start, group + 1, weight))
                start, weight = group + 1, 0
        return found

    def read(self, part: Part) -> Iterator[str]:
        """The texts of a part."""
        import pyarrow
        import pyarrow.parquet

        place = f"{self.path}, row groups {part.start} to {part.stop - 1},"
        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
                groups = list(range(part.start, part.stop))
                for batch in file.iter_batches(256, row_groups=groups, columns=[self.key], use_threads=False):
                    yield from [checked_text(row, self.key, place) for row in batch.to_pylist()]
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"cannot read {self.path}", str(error)[:200]) from None


def checked_text(row: dict[str, Any], key: str, place: str) -> str:
    """``row[key]``; ConfigError, beginning with ``place``, if it is missing, no text, or not encodable."""
    if key not in row:
        known = ", ".join(map(str, list(row)[:20])) or "none"
        raise ConfigError(f"{place} has no {key}", f"keys {known[:200]}", "--json-keys NAME")
    text = row[key]
    if not isinstance(text, str):
        raise ConfigError(f"{place} has no text in {key}", type(text).__name__, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place} has half a surrogate pair in {key}", None, "text that UTF-8 can hold") from None
    return text


def _open(path: str) -> BinaryIO:
    """A file as a stream of bytes, decompressed by the ending of its name."""
    ending = Path(path).suffix
    if ending == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if ending == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if ending == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def file_sources(path: str | os.PathLike[str], key: str, sample_by: str) -> list[Source]:
    """The sources in a file, or in all data files below a folder, sorted by path.

    ConfigError if there are none, or the ending of a file's name says nothing.
    """
    root = Path(path)
    known = JSON_ENDINGS + TEXT_ENDINGS + PARQUET_ENDINGS
    allowed = f"a name ending in {', '.join(known)}, all but parquet also with {', '.join(COMPRESSED_ENDINGS)}"
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file() and _plain_ending(file) in known)
        if not files:
            raise ConfigError(f"{root} holds no data files", None, allowed)
        return [source for file in files for source in file_sources(file, key, sample_by)]
    if not root.is_file():
        raise ConfigError("no such --input", root, "a file, a folder, or with --dataset a name on the hub")
    ending = _plain_ending(root)
    if ending in JSON_ENDINGS:
        return [JsonLines(str(root), key)]
    if ending in TEXT_ENDINGS:
        return [PlainText(str(root), sample_by)]
    if ending in PARQUET_ENDINGS and ending == root.suffix:
        return [Parquet(str(root), key)]
    raise ConfigError(f"the format of {root} is unknown", repr(root.name), allowed)


def _plain_ending(path: Path) -> str:
    """The last ending that is not one of compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED_ENDINGS else path).suffix.lower()
