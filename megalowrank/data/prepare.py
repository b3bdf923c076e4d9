"""From text to token files: tokenizer, ``.bin/.idx``, and a manifest ``prefix.json`` that describes them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megalowrank.data.tokens import TokenFile, write_tokens
from megalowrank.errors import ConfigError

_SCHEMA = 1
_MIN_VOCAB = 260  # 256 byte pieces, three control pieces, and one of text
_MANIFEST_TYPES = {
    "documents": int,
    "tokens": int,
    "bytes": int,
    "vocab_size": int,
    "tokenizer_sha256": str,
    "eos_id": int,
    "document_bytes": list,
    "source": dict,
}
_BLOCK = 1 << 22


def train_tokenizer(documents: Sequence[str], model_path: str | os.PathLike[str], vocab_size: int) -> None:
    """Train a sentencepiece BPE model of ``vocab_size`` pieces on ``documents`` and write it.

    Text survives encoding and decoding unchanged: no normalisation, every character of the text is in
    the vocabulary, and unknown ones (line ends, too) become bytes. One thread, so the same text gives
    the same file. ConfigError if the text has too few or too many distinct pieces for
    that size.
    """
    if vocab_size < _MIN_VOCAB:
        raise ConfigError("--vocab-size is out of range", vocab_size, f">= {_MIN_VOCAB}")
    model = io.BytesIO()
    # By lines, because sentencepiece leaves out whatever is longer than 4192 bytes.
    lines = (line for document in documents for line in document.splitlines() if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("] ", 1)[-1] or "there is no text"
        raise ConfigError("--vocab-size does not suit the text", f"{vocab_size}: {reason}") from None
    _write_whole(Path(model_path), model.getvalue())


def load_tokenizer(path: str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
    """The sentencepiece model at ``path``; ConfigError if it is missing or something else."""
    if not Path(path).is_file():
        raise ConfigError("no such tokenizer", os.fspath(path), "a sentencepiece .model file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    except (RuntimeError, OSError):
        raise ConfigError("not a tokenizer", os.fspath(path), "a sentencepiece .model file") from None


def tokenizer_vocab_size(path: str | os.PathLike[str]) -> int:
    """Number of pieces of the sentencepiece model at ``path``; ConfigError as load_tokenizer."""
    return load_tokenizer(path).vocab_size()


def prepare(
    documents: Sequence[str],
    prefix: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Tokenize ``documents`` (one EOS after each) into ``prefix.bin/.idx`` and write ``prefix.json``.

    Returns the manifest; ``source`` is any JSON object saying where the text is from. The manifest is
    written last, so where it is, the token files are complete. ConfigError if the tokenizer has no EOS.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    vocab_size, eos_id = tokenizer.vocab_size(), tokenizer.eos_id()
    if eos_id < 0:
        raise ConfigError("the tokenizer has no end-of-text piece", os.fspath(tokenizer_path))
    document_bytes = [len(document.encode()) for document in documents]
    manifest_path = _manifest_path(prefix)
    manifest_path.unlink(missing_ok=True)
    tokens = (np.array([*tokenizer.encode(document), eos_id], dtype=np.int64) for document in documents)
    n_documents, n_tokens = write_tokens(prefix, tokens, vocab_size)
    manifest = {
        "schema": _SCHEMA,
        "documents": n_documents,
        "tokens": n_tokens,
        "bytes": sum(document_bytes),
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(Path(tokenizer_path).read_bytes()).hexdigest(),
        "eos_id": eos_id,
        "document_bytes": document_bytes,
        "source": source,
    }
    _write_whole(manifest_path, json.dumps(manifest).encode())
    return manifest


def load_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest ``prefix.json``, None if there is none; ConfigError if damaged or of another schema."""
    path = _manifest_path(prefix)
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable manifest", error) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        raise ConfigError(f"{path} is not a manifest of schema {_SCHEMA}")
    for name, kind in _MANIFEST_TYPES.items():
        if not isinstance(manifest.get(name), kind):
            raise ConfigError(f"{path}: {name} is damaged", repr(manifest.get(name))[:40], kind.__name__)
    sizes = manifest["document_bytes"]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ConfigError(f"{path}: document_bytes is damaged", None, "a list of byte counts")
    if (len(sizes), sum(sizes)) != (manifest["documents"], manifest["bytes"]):
        raise ConfigError(f"{path} is damaged: document_bytes does not add up")
    return manifest


def unigram_loss(train_tokens: np.ndarray, valid_tokens: np.ndarray, vocab_size: int) -> float:
    """Mean loss in nats per token on ``valid_tokens`` [n] of the frequencies in ``train_tokens`` [m].

    Frequencies are counts plus 1. ConfigError if valid_tokens is empty, or a token not below
    ``vocab_size``.
    """
    if not len(valid_tokens):
        raise ConfigError("there are no validation tokens")
    frequencies = _count(train_tokens, vocab_size) + 1
    losses = np.log(frequencies.sum()) - np.log(frequencies)
    return float(losses @ _count(valid_tokens, vocab_size) / len(valid_tokens))


def _count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        if block.min() < 0 or block.max() >= vocab_size:
            raise ConfigError("token ids are outside the vocabulary", block.max(), f"0..{vocab_size - 1}")
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def bytes_per_token(manifest: dict[str, Any], token_file: TokenFile, token_range: tuple[int, int]) -> float:
    """UTF-8 bytes of text per token (EOS counted as a token) over ``token_range`` (start, stop).

    With a loss in nats per token, loss / ln 2 / bytes_per_token is bits per byte. ConfigError if the
    manifest describes other token files, or the range is empty or does not consist of whole documents.
    """
    if (manifest["documents"], manifest["tokens"]) != (token_file.n_documents, token_file.n_tokens):
        raise ConfigError(f"the manifest does not describe {token_file.prefix}.bin")
    start, stop = token_range
    first = int(np.searchsorted(token_file.document_starts, start))
    last = int(np.searchsorted(token_file.document_ends, stop, side="right"))
    whole = last > first and token_file.document_starts[first] == start
    if not whole or token_file.document_ends[last - 1] != stop:
        raise ConfigError("a token range has to consist of whole documents", f"[{start}, {stop})")
    return sum(manifest["document_bytes"][first:last]) / (stop - start)


def _manifest_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.json")


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
