"""A tokenizer trained on the spot, on a sample of the text that it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalowrank.data.files import file_sha256, write_whole
from megalowrank.data.sources import Source
from megalowrank.data.tokenizers import train_tokenizer
from megalowrank.errors import ConfigError

_COVERAGE = 0.9995
_PLACES = 64
_PART_BYTES = 1 << 20


def trained_tokenizer(
    sources: Sequence[Source],
    path: str | os.PathLike[str],
    vocab_size: int,
    characters: int,
    overwrite: bool = False,
) -> None:
    """Train a sentencepiece model of ``vocab_size`` pieces on about ``characters`` of the sources, at ``path``.

    Beside it, ``path.json`` says how it was made; one made in the same way is kept. Of the characters of
    the text, the rarest 0.05 % become bytes. ConfigError as train_tokenizer, and for a file at ``path`` that
    was made in another way, unless ``overwrite``.
    """
    recipe = {
        "vocab_size": vocab_size,
        "characters": characters,
        "character_coverage": _COVERAGE,
        "inputs": [source.describe() for source in sources],
    }
    record = Path(f"{os.fspath(path)}.json")
    if Path(path).is_file() and record.is_file():
        made = json.dumps({**recipe, "sha256": file_sha256(path)}, indent=1)
        if record.read_text(errors="replace") == made:
            return
    if Path(path).exists() and not overwrite:
        allowed = "another --output-prefix, --tokenizer-model to use it, or --overwrite"
        raise ConfigError(f"{os.fspath(path)} is there, made from something else", None, allowed)
    new = Path(f"{os.fspath(path)}.new")
    train_tokenizer(sample_texts(sources, characters), new, vocab_size, _COVERAGE)
    write_whole(record, json.dumps({**recipe, "sha256": file_sha256(new)}, indent=1).encode())
    os.replace(new, path)


def sample_texts(sources: Sequence[Source], characters: int) -> Iterator[str]:
    """Documents from places spread evenly over all sources, about ``characters`` in all."""
    parts = [(source, part) for source in sources for part in source.parts(_PART_BYTES)]
    count = min(len(parts), _PLACES)
    for number in range(count):
        source, part = parts[number * len(parts) // count]
        left = characters // count
        for text in source.read(part):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
