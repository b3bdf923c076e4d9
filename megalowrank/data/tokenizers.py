"""Tokenizers: sentencepiece model files and Hugging Face folders behind one small interface."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from megalowrank.data.files import write_whole
from megalowrank.errors import ConfigError, unknown_name

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
_MIN_VOCAB = 260  # 256 byte pieces, three control pieces, and one of text
_HF_FILES = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
_NOT_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")


class Tokenizer(Protocol):
    """What the project asks of a tokenizer; the names are sentencepiece's."""

    def vocab_size(self) -> int:
        """One more than the largest id."""

    def eos_id(self) -> int:
        """The id that ends a document; -1 if there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without pieces that mark its beginning or end."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""


class HuggingFaceTokenizer:
    """A transformers tokenizer behind the interface of ``Tokenizer``."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(len(self.inner), 1 + max(self.inner.get_vocab().values()))

    def eos_id(self) -> int:
        """The tokenizer's eos_token_id; -1 if it has none."""
        return -1 if self.inner.eos_token_id is None else int(self.inner.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return self.inner(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.inner.decode(ids, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | os.PathLike[str], kind: str | None = None) -> Tokenizer:
    """The tokenizer at ``path``: a sentencepiece file, or a Hugging Face folder (or name on its hub).

    ``kind`` is one of TYPES; None decides by what is there. Code that comes with a tokenizer is never
    run. ConfigError if it is missing or something else.
    """
    if kind is not None and kind not in TYPES:
        raise unknown_name("--tokenizer-type is not supported", kind, TYPES)
    folder = Path(path).is_dir() or (kind == TYPES[1] and not Path(path).exists())
    if folder and kind != TYPES[0]:
        return _load_huggingface(os.fspath(path))
    if kind == TYPES[1] or not Path(path).is_file():
        allowed = "a sentencepiece .model file or a folder with a Hugging Face tokenizer"
        raise ConfigError("no such tokenizer", os.fspath(path), allowed)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    except (RuntimeError, OSError):
        raise ConfigError("not a tokenizer", os.fspath(path), "a sentencepiece .model file") from None


def _load_huggingface(name: str) -> HuggingFaceTokenizer:
    # Imported here because it takes seconds, and sentencepiece files do not need it.
    from transformers import AutoTokenizer

    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # broken files surface as anything, from KeyError to the errors of Rust
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise ConfigError("no Hugging Face tokenizer", f"{name}: {reason}", "a folder of save_pretrained") from None


def tokenizer_vocab_size(path: str | os.PathLike[str]) -> int:
    """Ids of the tokenizer at ``path``; ConfigError as load_tokenizer."""
    return load_tokenizer(path).vocab_size()


def tokenizer_sha256(path: str | os.PathLike[str], tokenizer: Tokenizer) -> str:
    """Fingerprint of what was loaded from ``path``.

    The file's SHA-256; of a folder that of its tokenizer files, names included; of a hub name that of the
    vocabulary.
    """
    digest = hashlib.sha256()
    if Path(path).is_file():
        digest.update(Path(path).read_bytes())
    elif Path(path).is_dir():
        files = {file for pattern in _HF_FILES for file in Path(path).glob(pattern) if file.is_file()}
        for file in sorted(files, key=lambda file: file.name):
            if file.name not in _NOT_TOKENIZER:
                digest.update(f"{file.name}:{file.stat().st_size}:".encode() + file.read_bytes())
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        digest.update(repr(sorted(tokenizer.inner.get_vocab().items())).encode())
    return digest.hexdigest()


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [len(texts)] of the documents in tokens and their tokens end to end, each with ``eos`` unless None."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        rows = tokenizer.encode_batch(texts)
    else:
        rows = [tokenizer.encode(text) for text in texts]
    ending = [] if eos is None else [eos]
    parts = [np.array(row + ending, dtype=np.int64) for row in rows]
    return np.array([len(part) for part in parts], dtype=np.int64), np.concatenate([*parts, np.empty(0, np.int64)])


def train_tokenizer(
    documents: Iterable[str], model_path: str | os.PathLike[str], vocab_size: int, character_coverage: float = 1.0
) -> None:
    """Train a sentencepiece BPE model of ``vocab_size`` pieces on ``documents`` and write it.

    Text survives encoding and decoding unchanged: no normalisation, and characters beyond the most frequent
    ones, which make up ``character_coverage`` of the text, become bytes (so do line ends). One thread, so
    the same text gives the same file. ConfigError if the text has too few or too many distinct pieces for
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
            character_coverage=character_coverage,
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
    write_whole(model_path, model.getvalue())
