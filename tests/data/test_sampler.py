"""The order of samples: bijections, layouts over ranks, epochs, resumption."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megalowrank.data.sampler import BatchSampler, permute
from megalowrank.data.tokens import TokenFile, TokenWindow, write_tokens
from megalowrank.errors import ConfigError

SEQ_LENGTH = 4


@pytest.fixture
def make_window(tmp_path):
    """A window of n samples; the first token of sample i is i * SEQ_LENGTH."""

    def make(n_samples):
        write_tokens(tmp_path / "x", [np.arange(n_samples * SEQ_LENGTH + 1)], 60_000)
        token_file = TokenFile(tmp_path / "x")
        return TokenWindow(token_file, 0, token_file.n_tokens, SEQ_LENGTH)

    return make


def sample_numbers(batch):
    """Which samples a batch holds, and that the rows are whole."""
    numbers = batch[:, 0] // SEQ_LENGTH
    assert torch.equal(batch, numbers[:, None] * SEQ_LENGTH + torch.arange(SEQ_LENGTH + 1))
    return numbers.tolist()


def global_batch(sampler, step, micro_batch_size, dp_size):
    count = sampler.global_batch_size // (micro_batch_size * dp_size)
    parts = [
        sampler.micro_batch(step, index, micro_batch_size, rank, dp_size)
        for index in range(count)
        for rank in range(dp_size)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 50_000])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(n, key):
    values = permute(np.arange(n), n, key)
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(n))


def test_permute_is_pointwise_and_keeps_its_argument():
    index = np.arange(1000).reshape(20, 50)
    whole = permute(index, 1000, 7)
    assert whole.shape == (20, 50) and np.array_equal(index.ravel(), np.arange(1000))
    assert [int(permute(np.array([i]), 1000, 7)[0]) for i in range(1000)] == whole.ravel().tolist()
    assert permute(np.array([], dtype=np.int64), 10, 1).size == 0


def test_permute_of_a_range_beyond_memory():
    index = np.array([0, 1, 10**12, 10**15 - 1])
    values = permute(index, 10**15, 3)
    assert len(set(values.tolist())) == 4 and (values >= 0).all() and (values < 10**15).all()


@pytest.mark.parametrize("index", [[-1], [10], [3, 11]])
def test_permute_refuses_indices_outside(index):
    with pytest.raises(ValueError):
        permute(np.array(index), 10, 0)


def test_every_order_of_four_is_about_as_frequent():
    counts = Counter(tuple(permute(np.arange(4), 4, key).tolist()) for key in range(4800))
    expected = 4800 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 60  # 23 degrees of freedom: exceeded once in 30,000 times


def test_a_large_order_looks_random():
    values = permute(np.arange(20_000), 20_000, 11)
    assert abs(np.corrcoef(values, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert max(Counter(np.diff(values).tolist()).values()) < 10


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_layout_sees_the_same_global_batch(make_window, shuffle):
    sampler = BatchSampler(make_window(50), 5, 16, shuffle)
    for step in (0, 2, 3, 40):
        reference = global_batch(sampler, step, 1, 1)
        assert reference.shape == (16, SEQ_LENGTH + 1) and reference.dtype == torch.int64
        for micro_batch_size, dp_size in ((16, 1), (4, 1), (4, 2), (8, 2), (2, 4), (4, 4), (1, 16)):
            assert torch.equal(global_batch(sampler, step, micro_batch_size, dp_size), reference)


@pytest.mark.parametrize("n_samples, batch", [(48, 16), (50, 16), (7, 16), (1, 3), (33, 1)])
def test_epochs_repeat_and_skip_nothing(make_window, n_samples, batch):
    sampler = BatchSampler(make_window(n_samples), 3, batch)
    stream = []
    while len(stream) < 3 * n_samples:
        stream += sample_numbers(global_batch(sampler, len(stream) // batch, 1, 1))
    for epoch in range(3):
        assert sorted(stream[epoch * n_samples : (epoch + 1) * n_samples]) == list(range(n_samples))


def test_order_depends_on_seed_epoch_and_step_only(make_window):
    window = make_window(64)
    first = global_batch(BatchSampler(window, 1, 64), 0, 1, 1)
    assert torch.equal(first, global_batch(BatchSampler(window, 1, 64), 0, 1, 1))
    assert not torch.equal(first, global_batch(BatchSampler(window, 2, 64), 0, 1, 1))
    assert not torch.equal(first, global_batch(BatchSampler(window, 1, 64), 1, 1, 1))
    assert sample_numbers(first) != list(range(64))
    fresh, used = BatchSampler(window, 1, 8), BatchSampler(window, 1, 8)
    for step in range(11):
        global_batch(used, step, 2, 2)
    assert torch.equal(global_batch(fresh, 11, 2, 2), global_batch(used, 11, 2, 2))


def test_the_order_is_the_one_that_recorded_runs_have(make_window):
    sampler = BatchSampler(make_window(50), 5, 16)
    recorded = {
        0: [23, 5, 39, 44, 34, 31, 1, 40, 43, 32, 26, 20, 6, 3, 29, 12],
        3: [28, 24, 17, 26, 19, 3, 13, 2, 32, 23, 49, 1, 44, 29, 24, 20],
    }
    for step, expected in recorded.items():
        assert sample_numbers(global_batch(sampler, step, 4, 2)) == expected


@pytest.mark.parametrize("layouts", [[(4, 1), (2, 2), (1, 4)], [(1, 4), (4, 1)], [(2, 4), (8, 1), (1, 2)]])
def test_changing_ranks_on_resume_neither_repeats_nor_skips(make_window, layouts):
    """48 samples, updates of 8: the run is stopped after every 2 updates and goes on with other ranks."""
    sampler, seen = BatchSampler(make_window(48), 5, 8), []
    for step in range(12):
        micro_batch_size, ranks = layouts[step // 2 % len(layouts)]
        seen += sample_numbers(global_batch(sampler, step, micro_batch_size, ranks))
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen == [i for step in range(12) for i in sample_numbers(global_batch(sampler, step, 8, 1))]


def test_the_batch_size_does_not_change_the_order_of_samples(make_window):
    window = make_window(40)
    small = [i for step in range(10) for i in sample_numbers(global_batch(BatchSampler(window, 9, 4), step, 1, 1))]
    assert small == sample_numbers(global_batch(BatchSampler(window, 9, 40), 0, 1, 1))


def test_evaluation_counts_every_sample_at_most_once(make_window):
    sampler = BatchSampler(make_window(50), 5, 16, shuffle=False)
    assert sampler.batches_per_epoch == 3
    seen = [i for step in range(3) for i in sample_numbers(global_batch(sampler, step, 4, 2))]
    assert seen == list(range(48))


def test_a_window_smaller_than_a_batch_wraps(make_window):
    sampler = BatchSampler(make_window(5), 5, 16, shuffle=False)
    assert sampler.batches_per_epoch == 1
    assert sample_numbers(global_batch(sampler, 0, 4, 2)) == [i % 5 for i in range(16)]


def test_micro_batches_outside_the_global_batch_are_refused(make_window):
    sampler = BatchSampler(make_window(50), 5, 16)
    for index, micro_batch_size, rank, size in (
        (2, 4, 0, 2),
        (0, 4, 2, 2),
        (-1, 4, 0, 1),
        (0, 0, 0, 1),
        (0, 17, 0, 1),
    ):
        with pytest.raises(ValueError, match="outside the global batch"):
            sampler.micro_batch(0, index, micro_batch_size, rank, size)


def test_an_empty_window_is_refused(make_window):
    window = make_window(2)
    with pytest.raises(ConfigError, match="too short"):
        BatchSampler(TokenWindow(window.token_file, 0, SEQ_LENGTH, SEQ_LENGTH), 0, 4)
    with pytest.raises(ConfigError, match="--global-batch-size"):
        BatchSampler(window, 0, 0)
