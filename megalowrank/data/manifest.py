"""The manifest ``prefix.json``: what token files hold, by which tokenizer, and what they were made from."""

from __future__ import annotations

import bisect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megalowrank.data.files import file_sha256, write_whole
from megalowrank.data.spool import Joined
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError

_SCHEMA = 2
_TYPES = {
    "documents": int,
    "tokens": int,
    "bytes": int,
    "vocab_size": int,
    "tokenizer_sha256": str,
    "eos_id": int,
    "append_eod": bool,
    "bin_sha256": str,
    "sizes_sha256": str,
    "source": dict,
}


def manifest_of(
    joined: Joined, vocab_size: int, tokenizer_sha256: str, eos_id: int, append_eod: bool, source: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of token files just written. ``source`` is any JSON object; ``eos_id`` -1 means none."""
    return {
        "schema": _SCHEMA,
        "documents": joined.documents,
        "tokens": joined.tokens,
        "bytes": joined.text_bytes,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "eos_id": eos_id,
        "append_eod": append_eod,
        "bin_sha256": joined.bin_sha256,
        "sizes_sha256": joined.sizes_sha256,
        "source": source,
    }


def write_manifest(prefix: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Write ``prefix.json``: the last file to appear, so where it is, the others are complete."""
    write_whole(manifest_path(prefix), (json.dumps(manifest, indent=1) + "\n").encode())


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the manifest of ``prefix`` lies."""
    return Path(f"{os.fspath(prefix)}.json")


def load_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest ``prefix.json``, None if there is none; ConfigError if damaged or of another schema."""
    path = manifest_path(prefix)
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a readable manifest", str(error)[:200] or type(error).__name__) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        raise ConfigError(f"{path} is not a manifest of schema {_SCHEMA}", None, "prepare the data again")
    for name, kind in _TYPES.items():
        if type(manifest.get(name)) is not kind:
            raise ConfigError(f"{path}: {name} is damaged", repr(manifest.get(name))[:40], kind.__name__)
    return manifest


def bytes_per_token(manifest: dict[str, Any], token_file: TokenFile, token_range: tuple[int, int]) -> float:
    """UTF-8 bytes of text per token (EOS counted as a token) over ``token_range`` (start, stop).

    With a loss in nats per token, loss / ln 2 / bytes_per_token is bits per byte. ConfigError if the
    manifest describes other token files, the table of text sizes is damaged, or the range is empty or
    does not consist of whole documents.
    """
    if (manifest["documents"], manifest["tokens"]) != (token_file.n_documents, token_file.n_tokens):
        raise ConfigError(f"the manifest does not describe {token_file.prefix}.bin")
    sums = _open_sizes(manifest, token_file)
    start, stop = token_range
    numbers, offset_of = range(token_file.n_documents + 1), token_file.document_start
    first = bisect.bisect_left(numbers, start, key=offset_of)
    last = bisect.bisect_right(numbers, stop, key=offset_of) - 1
    if last <= first or (offset_of(first), offset_of(last)) != (start, stop) or start == stop:
        raise ConfigError("a token range has to consist of whole documents", f"[{start}, {stop})")
    return int(sums[last] - sums[first]) / (stop - start)


def _open_sizes(manifest: dict[str, Any], token_file: TokenFile) -> np.ndarray:
    """Running sums of the documents' bytes [n_documents + 1], as a memory map whose hash was checked."""
    path = f"{token_file.prefix}.sizes"
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror, "the file that was written beside the .bin") from None
    if found != manifest["sizes_sha256"] or os.path.getsize(path) != 8 * (token_file.n_documents + 1):
        raise ConfigError(f"{path} is damaged: it is not the one that the manifest names")
    return np.memmap(path, dtype="<i8", mode="r")
