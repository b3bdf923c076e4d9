"""What counting tokens says about data, before any training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalowrank.errors import ConfigError

_BLOCK = 1 << 22


def unigram_loss(
    train: Sequence[tuple[float, np.ndarray]], valid: Sequence[tuple[float, np.ndarray]], vocab_size: int
) -> float:
    """Mean loss in nats per token on ``valid`` of the frequencies of tokens in ``train``.

    Both are lists of (share, tokens [n]), the shares of a list adding up to 1: one entry for one data
    set, several for a blend. Frequencies are counts plus 1. ConfigError if a valid part is empty, or a
    token not below ``vocab_size``.
    """
    likelihood = np.zeros(vocab_size)
    for share, tokens in train:
        frequencies = count_tokens(tokens, vocab_size) + 1
        likelihood += share * frequencies / frequencies.sum()
    losses, total = -np.log(likelihood), 0.0
    for share, tokens in valid:
        if not len(tokens):
            raise ConfigError("there are no validation tokens")
        total += share * float(losses @ count_tokens(tokens, vocab_size)) / len(tokens)
    return total


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often every id occurs, int64 [vocab_size]; ConfigError for ids outside."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        if block.min() < 0 or block.max() >= vocab_size:
            raise ConfigError("token ids are outside the vocabulary", block.max(), f"0..{vocab_size - 1}")
        counts += np.bincount(block, minlength=vocab_size)
    return counts
