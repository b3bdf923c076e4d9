"""The data of a run: token files opened, split, blended and checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalowrank.config import DataConfig, TrainConfig
from megalowrank.data.blend import BlendedSampler, parse_blend
from megalowrank.data.files import file_sha256
from megalowrank.data.labelled import LabelledData
from megalowrank.data.manifest import bytes_per_token, load_manifest
from megalowrank.data.sampler import BatchSampler, GlobalBatches, key_of
from megalowrank.data.statistics import unigram_loss
from megalowrank.data.tokenizers import HuggingFaceTokenizer, tokenizer_vocab_size
from megalowrank.data.tokens import TokenFile, TokenWindow, split_documents
from megalowrank.engine.task import Task, open_task
from megalowrank.errors import ConfigError

_SAMPLED_TOKENS = 1 << 20
_UNIGRAM_TOKENS = 20_000_000


@dataclass(frozen=True)
class Corpus:
    """Samples to train on and to evaluate on; what is known of the held-out text.

    ``bytes_per_token`` and ``unigram_loss`` (nats per token) are of the validation split; of a blend, of
    tokens drawn in its proportions. ``bytes_per_token`` is None where a part has no manifest. ``task`` is there
    instead of all of these where labels are learned.
    """

    train: GlobalBatches
    valid: GlobalBatches | None
    bytes_per_token: float | None
    unigram_loss: float | None
    task: Task | None = None


@dataclass(frozen=True)
class Piece:
    """A range of tokens of one data set, and its share of the blend."""

    share: float
    tokens: TokenFile
    start: int
    stop: int

    def head(self) -> tuple[float, np.ndarray]:
        """Share, and the first tokens, to count."""
        return self.share, self.tokens.tokens[self.start : min(self.stop, self.start + _UNIGRAM_TOKENS)]


def tokenizer_size(config: DataConfig) -> int | None:
    """Vocabulary of the tokenizer that is named, or that the data was made with; None if unknown."""
    if config.tokenizer_model is not None:
        return tokenizer_vocab_size(config.tokenizer_model)
    manifests = [load_manifest(prefix) for prefix in _prefixes(config)]
    return next((int(manifest["vocab_size"]) for manifest in manifests if manifest), None)


def open_corpus(
    config: DataConfig, train: TrainConfig, vocab_size: int, global_batch_size: int, data: LabelledData | None = None
) -> Corpus:
    """Open the data sets that are named, or ``data``; every rank calls it.

    Raises ConfigError for missing or unfit files.
    """
    if data is not None:
        rows, task = open_task(data, config, train, vocab_size, global_batch_size)
        return Corpus(rows, None, None, None, task)
    manifests = {prefix: load_manifest(prefix) for prefix in _prefixes(config)}
    _check_one_tokenizer(manifests, config.tokenizer_model)
    files = {prefix: _open(prefix, vocab_size) for prefix in manifests}
    train_pieces, valid_pieces = _pieces(config, files, train.seq_length)
    samples = _sampler(train_pieces, train, global_batch_size, shuffle=True)
    if not valid_pieces or not config.eval_iters:
        return Corpus(samples, None, None, None)
    return Corpus(
        train=samples,
        valid=_sampler(valid_pieces, train, global_batch_size, shuffle=False),
        bytes_per_token=_bytes_per_token(valid_pieces, manifests),
        unigram_loss=unigram_loss(
            [piece.head() for piece in train_pieces], [piece.head() for piece in valid_pieces], vocab_size
        ),
    )


def _prefixes(config: DataConfig) -> list[str]:
    """Every prefix that is named, once, in order."""
    named = {
        "--data-path": config.data_path,
        "--train-data-path": config.train_data_path,
        "--valid-data-path": config.valid_data_path,
    }
    blends = [parse_blend(words, flag) for flag, words in named.items() if words]
    return list(dict.fromkeys(prefix for blend in blends for _, prefix in blend))


def _check_one_tokenizer(manifests: dict[str, dict[str, Any] | None], model: str | None) -> None:
    """All data were made by one tokenizer, and by ``model`` if both are sentencepiece files."""
    known = [(prefix, manifest) for prefix, manifest in manifests.items() if manifest]
    for prefix, manifest in known[1:]:
        if manifest["tokenizer_sha256"] != known[0][1]["tokenizer_sha256"]:
            raise ConfigError(f"{known[0][0]} and {prefix} were made by different tokenizers", None, "one for all data")
    if model is None or not known or not Path(model).is_file():
        return
    prefix, manifest = known[0]
    made_by = manifest["source"].get("tokenizer")
    if isinstance(made_by, dict) and made_by.get("type") == HuggingFaceTokenizer.__name__:
        return
    if file_sha256(model) != manifest["tokenizer_sha256"]:
        raise ConfigError(f"--tokenizer-model {model} is not the one that {prefix} was made with")


def _open(prefix: str, vocab_size: int) -> TokenFile:
    tokens = TokenFile(prefix)
    largest = tokens.max_token(_SAMPLED_TOKENS)
    if largest >= vocab_size:
        raise ConfigError(f"{prefix}.bin does not fit --vocab-size", f"token {largest}", f"< {vocab_size}")
    return tokens


def _pieces(config: DataConfig, files: dict[str, TokenFile], seq_length: int) -> tuple[list[Piece], list[Piece]]:
    """What to train on, and what to evaluate on (perhaps nothing)."""
    if config.data_path is None and config.train_data_path is None:
        raise ConfigError("--data-path is missing", None, "the prefix of Megatron .bin/.idx files")
    if config.data_path is None:
        return (
            _whole(config.train_data_path or [], "--train-data-path", files),
            _whole(config.valid_data_path or [], "--valid-data-path", files) if config.valid_data_path else [],
        )
    splits = []
    for share, prefix in parse_blend(config.data_path, "--data-path"):
        ranges = split_documents(files[prefix], config.split, seq_length)
        splits.append([Piece(share, files[prefix], *found) for found in ranges])
    train, valid = [pieces[0] for pieces in splits], [pieces[1] for pieces in splits]
    if train[0].start == train[0].stop:
        raise ConfigError("--split leaves no training data", config.split, "a first share above 0")
    return train, [] if valid[0].start == valid[0].stop else valid


def _whole(words: Sequence[str], flag: str, files: dict[str, TokenFile]) -> list[Piece]:
    blend = parse_blend(words, flag)
    return [Piece(share, files[prefix], 0, files[prefix].n_tokens) for share, prefix in blend]


def _sampler(pieces: list[Piece], train: TrainConfig, global_batch_size: int, shuffle: bool) -> GlobalBatches:
    windows = [TokenWindow(piece.tokens, piece.start, piece.stop, train.seq_length) for piece in pieces]
    if len(windows) == 1:
        return BatchSampler(windows[0], train.seed, global_batch_size, shuffle)
    seeds = [key_of("part", train.seed, number) for number in range(len(windows))]
    parts = [BatchSampler(window, seed, 1, shuffle) for window, seed in zip(windows, seeds, strict=True)]
    return BlendedSampler(parts, [piece.share for piece in pieces], global_batch_size)


def _bytes_per_token(pieces: list[Piece], manifests: dict[str, dict[str, Any] | None]) -> float | None:
    total = 0.0
    for piece in pieces:
        manifest = manifests[piece.tokens.prefix]
        if manifest is None:
            return None
        total += piece.share * bytes_per_token(manifest, piece.tokens, (piece.start, piece.stop))
    return total
