"""Rows of labelled text: padding, cuts, pairs, values, and the order of examples."""

from __future__ import annotations

import numpy as np
import pytest

from megalowrank.data.labelled import Example
from megalowrank.data.labelled_batches import MILLION, LabelledBatches, encode_examples
from megalowrank.errors import ConfigError


class Letters:
    """A tokenizer of letters, a = 1; its end-of-document token is 99."""

    def vocab_size(self) -> int:
        return 100

    def eos_id(self) -> int:
        return 99

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text if letter != " "]

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "pair", "tokens", "cut"),
    [
        ("abc", None, [1, 2, 3], 0), ("abcdef", None, [1, 2, 3, 4, 5, 6], 0), ("abcdefg", None, [1, 2, 3, 4, 5, 6], 1),
        ("ab", "c", [1, 2, 99, 3], 0), ("a", "bcdef", [1, 99, 2, 3, 4, 5], 1), ("abcdef", "g", [1, 2, 3, 4, 99, 7], 1),
        ("abcdef", "ghijkl", [1, 2, 99, 7, 8, 9], 1), ("ab", "cdefg", [1, 2, 99, 3, 4, 5], 1),
    ],
)  # fmt: skip
def test_rows(text: str, pair: str | None, tokens: list[int], cut: int) -> None:
    rows, cuts = encode_examples(Letters(), [Example(text, pair, 3)], 6)
    assert rows.dtype == np.int64 and cuts == cut
    assert rows.tolist() == [[*tokens, *[0] * (6 - len(tokens)), len(tokens), 3]]


def test_values_in_millionths_and_refusals() -> None:
    examples = [Example("a", None, value) for value in (1.5, -0.2000004, 0.0)]
    rows, _ = encode_examples(Letters(), examples, 2)
    assert rows[:, -1].tolist() == [1_500_000, -200_000, 0] and MILLION == 1_000_000
    for bad, what in ((Example("a", None, 1e13), "too large"), (Example(" ", None, 1), "has no tokens")):
        with pytest.raises(ConfigError, match=what):
            encode_examples(Letters(), [bad], 2)


def test_every_pass_has_every_example_once_in_an_order_of_its_own() -> None:
    rows = np.arange(7 * 4).reshape(7, 4)
    batches = LabelledBatches(rows, 5, 4)
    assert (len(batches), batches.seq_length, batches.batches_per_epoch) == (7, 2, 1)
    stream = np.concatenate([batches.micro_batch(step, 0, 4, 0, 1).numpy() for step in range(7)])
    passes = [stream[7 * n : 7 * n + 7, 0].tolist() for n in range(4)]
    assert all(sorted(order) == rows[:, 0].tolist() for order in passes) and len(set(map(tuple, passes))) == 4
    shared = [batches.micro_batch(2, index, 1, rank, 2) for index in range(2) for rank in range(2)]
    assert np.concatenate(shared).tolist() == stream[8:12].tolist()
    in_order = LabelledBatches(rows, 5, 4, shuffle=False)
    assert in_order.rows(np.array([6, 7])).tolist() == rows[[6, 0]].tolist()
