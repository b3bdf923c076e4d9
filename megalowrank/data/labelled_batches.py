"""Labelled text as one tensor of integers: what engines, pipelines and methods hand on as any other batch.

A row is S token ids, padded on the right, then how many of them are real, then the label: the number of a class, or in
a regression the value in millionths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalowrank.data.labelled import Example
from megalowrank.data.sampler import GlobalBatches, epoch_order
from megalowrank.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from megalowrank.errors import ConfigError

MILLION = 10**6
_PADDING = 0
_LARGEST = 2**62


class LabelledBatches(GlobalBatches):
    """The rows [n, S + 2] of a task as a stream: pass g // n in its own order, drawn from (seed, pass).

    Without ``shuffle`` every pass is in order.
    """

    def __init__(self, encoded: np.ndarray, seed: int, global_batch_size: int, shuffle: bool = True) -> None:
        super().__init__(encoded.shape[1] - 2, global_batch_size)
        self.encoded, self.seed, self.shuffle = encoded, seed, shuffle

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches without a repeated example; 1, with repeats, if there are fewer examples."""
        return max(1, len(self.encoded) // self.global_batch_size)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The examples at these positions of the stream: int64 [n] to int64 [n, S + 2]."""
        return self.encoded[epoch_order(positions, len(self.encoded), self.seed if self.shuffle else None)]


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> tuple[np.ndarray, int]:
    """Rows int64 [n, length + 2], and how many texts were cut to ``length`` tokens.

    The second text follows the first after the tokenizer's end-of-document token, where it has one; of a pair that is
    too long the longer text loses its end. Raises ConfigError for a text without tokens and a value beyond 4.6e12.
    """
    first = _tokens(tokenizer, [example.text for example in examples])
    second = _tokens(tokenizer, [example.text_pair or "" for example in examples])
    between = [tokenizer.eos_id()] if tokenizer.eos_id() >= 0 else []
    rows, cut = np.full((len(examples), length + 2), _PADDING, dtype=np.int64), 0
    for row, example, text, pair in zip(rows, examples, first, second, strict=True):
        middle = between if example.text_pair is not None else []
        kept = _fitting(len(text), len(pair), length - len(middle))
        tokens = [*text[: kept[0]], *middle, *pair[: kept[1]]]
        if not tokens:
            raise ConfigError("a text has no tokens", repr(example.text)[:40], "text that the tokenizer knows")
        cut += len(tokens) < len(text) + len(middle) + len(pair)
        row[: len(tokens)] = tokens
        row[length:] = len(tokens), _number(example.label)
    return rows, cut


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]


def _fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept in ``room``: what is too much is taken from the longer one."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    return (room - second, second) if second <= room - half else (half, room - half)


def _number(label: int | float) -> int:
    """A class as it is, a value in millionths."""
    if isinstance(label, int):
        return label
    if abs(label) * MILLION >= _LARGEST:
        raise ConfigError("a value is too large to be learned", label, f"below {_LARGEST // MILLION:.2g}")
    return round(label * MILLION)
