"""The data of a run: token files opened, split and checked against the model."""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.config import DataConfig, TrainConfig
from megalowrank.data.prepare import bytes_per_token, load_manifest, tokenizer_vocab_size, unigram_loss
from megalowrank.data.sampler import BatchSampler
from megalowrank.data.tokens import TokenFile, TokenWindow, split_documents
from megalowrank.errors import ConfigError

_SAMPLED_TOKENS = 1 << 20
_UNIGRAM_TOKENS = 20_000_000


@dataclass(frozen=True)
class Corpus:
    """Samples to train on and to evaluate on; what is known of the held-out text.

    ``bytes_per_token`` and ``unigram_loss`` (nats per token) are of the validation split.
    """

    train: BatchSampler
    valid: BatchSampler | None
    bytes_per_token: float | None
    unigram_loss: float | None


def tokenizer_size(config: DataConfig) -> int | None:
    """Vocabulary of the tokenizer that is named, or that the data was made with; None if unknown."""
    if config.tokenizer_model is not None:
        return tokenizer_vocab_size(config.tokenizer_model)
    manifest = load_manifest(config.data_path) if config.data_path else None
    return int(manifest["vocab_size"]) if manifest else None


def open_corpus(config: DataConfig, train: TrainConfig, vocab_size: int, global_batch_size: int) -> Corpus:
    """Open ``--data-path``; every rank calls it. Raises ConfigError for missing or unfit files."""
    if config.data_path is None:
        raise ConfigError("--data-path is missing", None, "the prefix of Megatron .bin/.idx files")
    tokens = TokenFile(config.data_path)
    largest = tokens.max_token(_SAMPLED_TOKENS)
    if largest >= vocab_size:
        raise ConfigError(f"{config.data_path}.bin does not fit --vocab-size", f"token {largest}", f"< {vocab_size}")
    ranges = split_documents(tokens, config.split, train.seq_length)
    windows = [TokenWindow(tokens, start, stop, train.seq_length) for start, stop in ranges]
    if not len(windows[0]):
        raise ConfigError("--split leaves no training data", config.split, "a first share above 0")
    samples = BatchSampler(windows[0], train.seed, global_batch_size)
    if not len(windows[1]) or not config.eval_iters:
        return Corpus(samples, None, None, None)
    manifest = load_manifest(config.data_path)
    (first, stop), held_out = ranges[0], ranges[1]
    return Corpus(
        train=samples,
        valid=BatchSampler(windows[1], train.seed, global_batch_size, shuffle=False),
        bytes_per_token=bytes_per_token(manifest, tokens, held_out) if manifest else None,
        unigram_loss=unigram_loss(
            tokens.tokens[first : min(stop, first + _UNIGRAM_TOKENS)],
            tokens.tokens[held_out[0] : min(held_out[1], held_out[0] + _UNIGRAM_TOKENS)],
            vocab_size,
        ),
    )
