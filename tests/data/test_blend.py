"""Blends: proportions, purity, every sample of every part once a pass, any number of ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megalowrank.data.blend import PERIOD, BlendedSampler, interleave, parse_blend, whole_shares
from megalowrank.data.sampler import BatchSampler
from megalowrank.data.tokens import TokenFile, TokenWindow, write_tokens
from megalowrank.errors import ConfigError

LENGTH = 4
BASE = 10_000


def make_parts(folder: Path, sizes: list[int], shuffle: bool = True) -> list[BatchSampler]:
    """Part k has sizes[k] samples; the first token of sample i is k * BASE + i * LENGTH."""
    parts = []
    for number, size in enumerate(sizes):
        write_tokens(folder / f"p{number}", [number * BASE + np.arange(size * LENGTH + 1)], 65_000)
        file = TokenFile(folder / f"p{number}")
        parts.append(BatchSampler(TokenWindow(file, 0, file.n_tokens, LENGTH), 100 + number, 1, shuffle))
    return parts


def stream(sampler: BlendedSampler, count: int, start: int = 0) -> list[tuple[int, int]]:
    """(part, sample) of positions start..start+count, read off the tokens."""
    first = sampler.rows(np.arange(start, start + count))[:, 0]
    return [(int(token) // BASE, int(token) % BASE // LENGTH) for token in first]


@pytest.mark.parametrize("shares", [[0.3, 0.7], [0.05, 0.15, 0.8], [1 / 3, 1 / 3, 1 / 3], [0.0001, 0.9999]])
def test_proportions_are_exact_over_a_period_and_close_before(tmp_path: Path, shares: list[float]) -> None:
    sampler = BlendedSampler(make_parts(tmp_path, [7, 50, 31][: len(shares)]), shares, 8)
    numbers, _ = sampler.locate(np.arange(2 * PERIOD))
    counts = [np.cumsum(numbers == number) for number in range(len(shares))]
    for share, count in zip(shares, counts, strict=True):
        assert abs(count[PERIOD - 1] - share * PERIOD) < 1
        assert np.abs(count - share * np.arange(1, 2 * PERIOD + 1)).max() < 2.5
    assert np.array_equal(numbers[:PERIOD], numbers[PERIOD:])


def test_the_table_is_the_one_of_a_brute_force_in_fractions() -> None:
    counts = whole_shares([0.12345, 0.5, 0.37655])
    assert sum(counts) == PERIOD and counts[1] == 5000
    taken, expected = [0, 0, 0], []
    for place in range(300):
        behind = [Fraction(count * (place + 1), PERIOD) - done for count, done in zip(counts, taken, strict=True)]
        expected.append(behind.index(max(behind)))
        taken[expected[-1]] += 1
    assert interleave(counts)[:300].tolist() == expected


def test_each_part_goes_through_its_own_order_without_repeat_or_gap(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, [7, 50])
    sampler = BlendedSampler(parts, [0.25, 0.75], 8)
    seen = stream(sampler, 2 * PERIOD)
    for number, part in enumerate(parts):
        own = [sample for found, sample in seen if found == number]
        assert own == part.sample_indices(np.arange(len(own))).tolist()
        length = len(part.window)
        assert sorted(own[:length]) == sorted(own[length : 2 * length]) == list(range(length))
        assert own[:length] != own[length : 2 * length]


def test_a_position_is_a_pure_function_of_seed_and_position(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, [7, 50])
    whole = stream(BlendedSampler(parts, [0.4, 0.6], 8), 500, start=PERIOD - 250)
    single = BlendedSampler(parts, [0.4, 0.6], 32)
    drawn = np.random.default_rng(0).permutation(500)
    assert [stream(single, 1, start=PERIOD - 250 + int(i))[0] for i in drawn] == [whole[i] for i in drawn]


def test_any_number_of_ranks_shares_out_the_same_batches(tmp_path: Path) -> None:
    sampler = BlendedSampler(make_parts(tmp_path, [7, 50]), [0.4, 0.6], 16)
    for step in (0, 3, 10**9):
        batches = []
        for micro, ranks in ((16, 1), (4, 2), (2, 4), (4, 4)):
            parts = [
                sampler.micro_batch(step, index, micro, rank, ranks)
                for index in range(16 // (micro * ranks))
                for rank in range(ranks)
            ]
            batches.append(torch.cat(parts))
        assert batches[0].shape == (16, LENGTH + 1) and batches[0].dtype == torch.int64
        assert all(torch.equal(batches[0], other) for other in batches[1:])


def test_an_epoch_ends_before_the_first_repeat(tmp_path: Path) -> None:
    for sizes in ([7, 50], [50, 7], [1, 1], [30, 70]):
        parts = make_parts(tmp_path, sizes, shuffle=False)
        sampler = BlendedSampler(parts, [0.3, 0.7], 1)
        count = sampler.batches_per_epoch
        assert max(Counter(stream(sampler, count)).values()) == 1
        assert max(Counter(stream(sampler, count + 1)).values()) == 2


def test_parse_blend() -> None:
    assert parse_blend(["a/b"], "--data-path") == [(1.0, "a/b")]
    assert parse_blend([3, "a", "1", "b"], "--data-path") == [(0.75, "a"), (0.25, "b")]
    assert parse_blend(["1", "a", "1", "a"], "--data-path") == [(0.5, "a"), (0.5, "a")]


@pytest.mark.parametrize(
    "words",
    [[], ["a", "b"], ["1", "a", "2"], ["0", "a", "1", "b"], ["-1", "a", "1", "b"], ["nan", "a", "1", "b"],
     ["inf", "a", "1", "b"], ["1", "a", "100000", "b"]],
)  # fmt: skip
def test_malformed_blends(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data-path"):
        parse_blend(words, "--data-path")
