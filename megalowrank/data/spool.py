"""Spools: tokenized documents on their way into token files, whatever their number in constant memory.

A spool is three files: STEM.bin, the tokens end to end; STEM.len, the tokens of every document (int32);
STEM.size, the bytes of text of every document (int64). ``join`` makes Megatron's pair of files, and
the table of text sizes, out of any number of them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalowrank.data.files import BLOCK, blocks
from megalowrank.data.index import write_index
from megalowrank.errors import ConfigError

ENDINGS = (".bin", ".len", ".size")
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class SpoolRecord:
    """What a finished spool holds. ``sha256`` are those of its three files."""

    documents: int
    tokens: int
    text_bytes: int
    sha256: tuple[str, str, str]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> SpoolRecord:
        """Inverse of as_json; KeyError, TypeError or ValueError if it makes no sense."""
        first, second, third = map(str, found["sha256"])
        return cls(int(found["documents"]), int(found["tokens"]), int(found["text_bytes"]), (first, second, third))


class Spool:
    """Writes one spool at ``stem``; ``close`` completes it, ``discard`` removes it."""

    def __init__(self, stem: str | os.PathLike[str], dtype: type, vocab_size: int) -> None:
        self.stem, self.dtype, self.vocab_size = os.fspath(stem), dtype, vocab_size
        self.documents = self.tokens = self.text_bytes = 0
        self._streams = [io.BufferedWriter(io.FileIO(self.stem + ending, "w"), BLOCK) for ending in ENDINGS]
        self._digests = [hashlib.sha256() for _ in ENDINGS]

    def add(self, lengths: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray) -> None:
        """Append documents: ``tokens`` of all of them end to end, ``lengths`` and ``text_bytes`` of each [n].

        ConfigError for a token outside the vocabulary or a document beyond the format's 2**31 - 1 tokens.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            got = f"{tokens.min()}..{tokens.max()} from document {self.documents} on"
            raise ConfigError("token ids are outside the vocabulary", got, f"0..{self.vocab_size - 1}")
        if lengths.size and lengths.max() > _LONGEST:
            raise ConfigError("a document is too long", f"{lengths.max()} tokens", f"<= {_LONGEST}")
        content: tuple[np.ndarray, ...] = (tokens.astype(self.dtype), lengths.astype("<i4"), text_bytes.astype("<i8"))
        for stream, digest, values in zip(self._streams, self._digests, content, strict=True):
            data = values.tobytes()
            stream.write(data)
            digest.update(data)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.text_bytes += int(text_bytes.sum())

    def close(self) -> SpoolRecord:
        """Flush and close the files."""
        for stream in self._streams:
            stream.close()
        first, second, third = (digest.hexdigest() for digest in self._digests)
        return SpoolRecord(self.documents, self.tokens, self.text_bytes, (first, second, third))

    def discard(self) -> None:
        """Close and remove the files."""
        for stream, ending in zip(self._streams, ENDINGS, strict=True):
            stream.close()
            Path(self.stem + ending).unlink(missing_ok=True)


@dataclass(frozen=True)
class Joined:
    """Counts of joined spools; SHA-256 of the token file and of the table of text sizes."""

    documents: int
    tokens: int
    text_bytes: int
    bin_sha256: str
    sizes_sha256: str


def join(
    spools: Sequence[tuple[str, SpoolRecord]],
    prefix: str | os.PathLike[str],
    dtype: type,
    sizes: bool = True,
    scratch: str | None = None,
) -> Joined:
    """Make ``prefix.bin``, ``.idx`` and (with ``sizes``) ``.sizes`` out of finished spools, in their order.

    All are written at the stem ``scratch`` (default: beside their place), synced, and moved into place, the
    index last; the old index goes first, so that an interruption leaves no index rather than one of other
    tokens. ``.sizes`` is an int64 [documents + 1] of running sums of text bytes. ConfigError if there are no
    tokens, or a spool is not what its record says.
    """
    target = os.fspath(prefix)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    records = [record for _, record in spools]
    documents = sum(record.documents for record in records)
    if not sum(record.tokens for record in records):
        raise ConfigError("there are no tokens to write", target)
    temporary = scratch or f"{target}.{os.getpid()}.tmp"
    endings = (".bin", ".sizes", ".idx") if sizes else (".bin", ".idx")
    try:
        bin_sha256 = _concatenate(spools, f"{temporary}.bin")
        sizes_sha256 = _write_sizes(spools, f"{temporary}.sizes") if sizes else ""
        write_index(f"{temporary}.idx", dtype, documents, lambda: _column(spools, 1, "<i4"))
        Path(f"{target}.idx").unlink(missing_ok=True)
        for ending in endings:
            os.replace(temporary + ending, target + ending)
    finally:
        for ending in endings:
            Path(temporary + ending).unlink(missing_ok=True)
    totals = (sum(record.tokens for record in records), sum(record.text_bytes for record in records))
    return Joined(documents, *totals, bin_sha256, sizes_sha256)


def _concatenate(spools: Sequence[tuple[str, SpoolRecord]], path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for block in _checked_blocks(spools, 0):
            stream.write(block)
            digest.update(block)
        _sync(stream)
    return digest.hexdigest()


def _write_sizes(spools: Sequence[tuple[str, SpoolRecord]], path: str) -> str:
    digest, total = hashlib.sha256(), 0
    with open(path, "wb") as stream:
        for block in [np.zeros(1, "<i8")], _column(spools, 2, "<i8"):
            for values in block:
                sums = total + np.cumsum(values, dtype="<i8")
                total = int(sums[-1])
                stream.write(sums.tobytes())
                digest.update(sums.tobytes())
        _sync(stream)
    return digest.hexdigest()


def _column(spools: Sequence[tuple[str, SpoolRecord]], number: int, dtype: str) -> Iterator[np.ndarray]:
    return (np.frombuffer(block, dtype) for block in _checked_blocks(spools, number))


def _checked_blocks(spools: Sequence[tuple[str, SpoolRecord]], number: int) -> Iterator[bytes]:
    """The content of one of the three files of every spool; ConfigError where its hash is another one."""
    for stem, record in spools:
        digest, path = hashlib.sha256(), stem + ENDINGS[number]
        for block in blocks(path):
            digest.update(block)
            yield block
        if digest.hexdigest() != record.sha256[number]:
            raise ConfigError(f"{path} was damaged after it was written", None, "run again: it is made anew")


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
