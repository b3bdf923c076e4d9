"""Movie-review snippets with the mean judgement of 20 raters, as a task of two classes.

They come with the source package of VADER (C. J. Hutto and E. Gilbert 2014; MIT licence) and are fetched when asked
for.
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megalowrank.data.archive import Archive, fetch_archive, pip_download, read_members
from megalowrank.data.files import write_whole
from megalowrank.data.labelled import Example
from megalowrank.errors import ConfigError

REVIEWS = Archive(
    project="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=r"vaderSentiment-3\.3\.2/additional_resources/hutto_ICWSM_2014\.tar\.gz",
)
CLASSES = ("negative", "positive")
_TABLE = "movieReviewSnippets_GroundTruth.txt"
_LEAST_MEAN = 0.5
_SPLIT_SEED, _TENTH = 0, 10


def review_examples(
    cache: str | os.PathLike[str],
    archive: Archive = REVIEWS,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate with, a tenth, in a fixed shuffled order; the label is the sign of the mean.

    Snippets whose mean is nearer to 0 than 0.5 are left out. Raises ConfigError as fetch_archive, or if the archive
    holds something else.
    """
    inner = next(read_members(fetch_archive(cache, archive, fetch), archive.members))
    found = _examples(_table(inner, archive.filename).decode("latin-1"), archive.filename)
    random.Random(_SPLIT_SEED).shuffle(found)
    held = len(found) // _TENTH
    return found[held:], found[:held]


def write_examples(path: str | os.PathLike[str], examples: Sequence[Example], classes: Sequence[str]) -> None:
    """One JSON object a line: text and the name of its class."""
    lines = (json.dumps({"text": it.text, "label": classes[int(it.label)]}, ensure_ascii=False) for it in examples)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def _table(inner: bytes, name: str) -> bytes:
    """The table of snippets in the archive inside the archive."""
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if os.path.basename(member.name) == _TABLE else None
            if stream is not None:
                return stream.read()
    raise ConfigError(f"{name} holds no {_TABLE}")


def _examples(table: str, name: str) -> list[Example]:
    """Rows of number, mean and text, those of a clear mean; ConfigError for another table."""
    found = []
    for number, line in enumerate(table.rstrip("\n").split("\n"), 1):
        try:
            _, mean, text = line.rstrip("\r").split("\t", 2)
            judgement = float(mean)
        except ValueError:
            raise ConfigError(f"{name}: row {number} is no snippet", repr(line[:40]), "number, mean and text") from None
        if abs(judgement) >= _LEAST_MEAN:
            found.append(Example(text.strip(), None, int(judgement > 0)))
    return found
