"""From documents in memory to token files: for the sample texts and for tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalowrank.data.index import token_dtype
from megalowrank.data.manifest import manifest_of, manifest_path, write_manifest
from megalowrank.data.spool import Spool, join
from megalowrank.data.tokenizers import Tokenizer, encode_documents, load_tokenizer, tokenizer_sha256
from megalowrank.errors import ConfigError


def prepare(
    documents: Sequence[str],
    prefix: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Tokenize ``documents`` (one EOS after each) into ``prefix.bin/.idx/.sizes`` and write ``prefix.json``.

    Returns the manifest; ``source`` is any JSON object saying where the text is from. The manifest is
    written last, so where it is, the token files are complete. ConfigError if the tokenizer has no EOS.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    eos_id, dtype = end_of_text(tokenizer, tokenizer_path), token_dtype(tokenizer.vocab_size())
    manifest_path(prefix).parent.mkdir(parents=True, exist_ok=True)
    manifest_path(prefix).unlink(missing_ok=True)
    spool = Spool(f"{os.fspath(prefix)}.{os.getpid()}.spool", dtype, tokenizer.vocab_size())
    try:
        for document in documents:
            spool.add(*encode_documents(tokenizer, [document], eos_id), np.array([len(document.encode())]))
        joined = join([(spool.stem, spool.close())], prefix, dtype)
    finally:
        spool.discard()
    digest = tokenizer_sha256(tokenizer_path, tokenizer)
    manifest = manifest_of(joined, tokenizer.vocab_size(), digest, eos_id, True, source)
    write_manifest(prefix, manifest)
    return manifest


def end_of_text(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> int:
    """The id that ends a document; ConfigError if the tokenizer at ``path`` has none."""
    eos_id = tokenizer.eos_id()
    if eos_id < 0:
        raise ConfigError("the tokenizer has no end-of-text piece", os.fspath(path))
    return eos_id
