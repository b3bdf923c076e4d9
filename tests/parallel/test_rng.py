"""Draws as pure functions of their keys: published vectors, statistics, and independence of who asks."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from megalowrank.parallel.rng import generator, key_of, mix, uniform
from tests.harness import ROOT

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# The first outputs of splitmix64 with seed 1234567 (Vigna's splitmix64.c)
SPLITMIX = (
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
)  # fmt: skip


def draws(steps: int, indices: int, seed: int = 1, stream: str = "test") -> np.ndarray:
    return uniform(seed, stream, np.arange(steps), np.arange(indices))


def mix_in_python(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mix_is_splitmix64() -> None:
    states = [(1234567 + (k + 1) * GOLDEN) & MASK for k in range(len(SPLITMIX))]
    assert [mix_in_python(state) for state in states] == list(SPLITMIX)
    with np.errstate(over="ignore"):
        assert mix(np.array(states, dtype=np.uint64)).tolist() == list(SPLITMIX)


def test_uniform_is_what_it_says() -> None:
    """In Python's own integers, from the definition."""
    key = int.from_bytes(hashlib.sha256(b"7\x1fswitch").digest()[:8], "little") >> 1
    steps, indices = np.array([0, 3, 10**6]), np.array([5, 0, 123456])
    for row, step in zip(uniform(7, "switch", steps, indices), steps.tolist(), strict=True):
        start = mix_in_python((key + step * GOLDEN) & MASK)
        words = [mix_in_python((start + (index + 1) * GOLDEN) & MASK) for index in indices.tolist()]
        assert row.tolist() == [(word >> 11) / 2**53 for word in words]


def test_values_that_must_never_change() -> None:
    """A checkpoint goes on with the same draws in every later version."""
    assert key_of(1234, "layers.0.attention.q.weight") == 8246263678638953776
    assert key_of() == 724655455495936113
    assert uniform(1234, "switch", np.array([0, 40]), np.array([0, 6])).tolist() == [
        [0.632649751550628, 0.3429700239710639],
        [0.9629625824511687, 0.5638070768982865],
    ]
    assert torch.randint(0, 10**6, (4,), generator=generator(1234, "slots", 3, 1)).tolist() == [
        36019,
        450076,
        513985,
        925351,
    ]


def test_keys_are_the_same_in_another_process() -> None:
    code = "from megalowrank.parallel.rng import key_of; print(key_of(1, 'a', 2.5))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) == key_of(1, "a", 2.5)


def test_keys_differ_and_fit_torch() -> None:
    parts = [("",), ("", ""), (1,), ("1", ""), (1, 2), (12,), ("1", "2", ""), (2, 1), ("ab", "c"), ("a", "bc")]
    keys = [key_of(*part) for part in parts] + [key_of(seed, "x") for seed in range(2000)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    assert key_of(1, 2) == key_of("1", "2"), "numbers count by how they are printed"


def test_mean_variance_and_range() -> None:
    found = draws(1000, 1000).ravel()
    assert found.dtype == np.float64 and found.min() >= 0.0 and found.max() < 1.0
    assert len(np.unique(found)) == found.size
    deviation = (1 / 12 / found.size) ** 0.5
    assert abs(found.mean() - 0.5) < 4 * deviation
    assert abs(found.var() - 1 / 12) < 4 * (1 / 180 / found.size) ** 0.5
    moments = [np.mean(found**power) for power in (3, 4, 5)]
    assert moments == pytest.approx([1 / 4, 1 / 5, 1 / 6], abs=2e-3)


@pytest.mark.parametrize("axis", ["rows", "columns", "all"])
def test_chi_square_of_a_hundred_bins(axis: str) -> None:
    """Every row, every column and all values fill the bins evenly; 99 degrees of freedom, five sigma."""
    table = draws(64, 20_000) if axis == "rows" else draws(20_000, 64).T if axis == "columns" else draws(500, 500)
    for values in table if axis != "all" else table.reshape(1, -1):
        counts = np.bincount((values * 100).astype(int), minlength=100)
        expected = values.size / 100
        chi = ((counts - expected) ** 2).sum() / expected
        assert abs(chi - 99) < 5 * (2 * 99) ** 0.5


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (1, 1), (1, -1), (0, 7), (40, 0)])
def test_neighbours_are_not_correlated(down: int, right: int) -> None:
    table = draws(700, 700) - 0.5
    rows, columns = table.shape
    first = table[: rows - down, max(0, -right) : columns - max(0, right)]
    second = table[down:, max(0, right) : columns + min(0, right)]
    assert abs((first * second).mean() * 12) < 4.5 / first.size**0.5


def test_streams_and_seeds_are_not_correlated() -> None:
    base = draws(400, 400) - 0.5
    for other in (draws(400, 400, seed=2), draws(400, 400, stream="tess"), draws(400, 400, seed=11)):
        assert abs((base * (other - 0.5)).mean() * 12) < 4.5 / base.size**0.5
        assert not (base + 0.5 == other).any()


def test_who_asks_and_in_which_order_does_not_matter() -> None:
    whole, source = draws(30, 50), np.random.default_rng(0)
    steps, indices = source.permutation(30), source.permutation(50)
    assert np.array_equal(uniform(1, "test", steps, indices), whole[np.ix_(steps, indices)])
    for rank in range(3):
        own = np.arange(rank, 50, 3)
        assert np.array_equal(uniform(1, "test", np.array([17]), own)[0], whole[17, own])
    assert np.array_equal(draws(30, 500)[:, :50], whole)
    assert uniform(1, "test", np.arange(0), np.arange(4)).shape == (0, 4)


def test_generators_are_apart_and_repeat() -> None:
    first = torch.rand(2000, generator=generator(1, "w"))
    assert torch.equal(first, torch.rand(2000, generator=generator(1, "w")))
    for other in (generator(2, "w"), generator(1, "v"), generator(1, "w", 0)):
        both = torch.stack([first, torch.rand(2000, generator=other)])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1
