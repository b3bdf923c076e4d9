"""Measures of predictions against values from counting, from torch, from scikit-learn's documentation, and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megalowrank.data.metrics import accuracy, f1, matthews, metrics_of, pearson, spearman
from megalowrank.errors import ConfigError


def counted(said: np.ndarray, true: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives, one by one."""
    pairs = list(zip(said.tolist(), true.tolist(), strict=True))
    return tuple(sum(pair == wanted for pair in pairs) for wanted in ((1, 1), (1, 0), (0, 1), (0, 0)))  # type: ignore


def test_two_classes_by_counting() -> None:
    for said, true in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
        a, b = np.array(said), np.array(true)
        tp, fp, fn, tn = counted(a, b)
        assert accuracy(a, b) == (tp + tn) / 4
        assert f1(a, b) == pytest.approx(tp / (tp + (fp + fn) / 2) if tp else 0.0)
        root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert matthews(a, b) == pytest.approx((tp * tn - fp * fn) / root if root else 0.0, abs=1e-12)


def test_many_classes() -> None:
    true, said = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])
    assert f1(said, true) == pytest.approx((4 / 5 + 0 + 0) / 3)
    source = np.random.default_rng(1)
    said, true = source.integers(0, 4, 200), source.integers(0, 4, 200)
    said = np.where(source.random(200) < 0.5, true, said)
    table = np.array([[np.sum((true == k) & (said == m)) for m in range(4)] for k in range(4)])
    c, s, t, p = np.trace(table), table.sum(), table.sum(1), table.sum(0)
    expected = (c * s - t @ p) / math.sqrt((s**2 - p @ p) * (s**2 - t @ t))
    assert matthews(said, true) == pytest.approx(expected, rel=1e-12)
    per_class = [2 * table[k, k] / (t[k] + p[k]) for k in range(4)]
    assert f1(said, true) == pytest.approx(np.mean(per_class), rel=1e-12)


def test_correlations() -> None:
    source = np.random.default_rng(2)
    x = source.normal(size=50)
    y = x + source.normal(size=50)
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.from_numpy(np.stack((x, y))))[0, 1]), rel=1e-12)
    ranks = [[sum(v < w for v in z) for w in z] for z in (x, y)]
    assert spearman(x, y) == pytest.approx(float(np.corrcoef(*ranks)[0, 1]), rel=1e-12)
    assert spearman(np.exp(x), y) == pytest.approx(spearman(x, y), rel=1e-12)
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(math.sqrt(0.9), rel=1e-12)
    assert pearson(np.array([1, 2, 3]), np.array([6, 4, 2])) == pytest.approx(-1.0, rel=1e-12)


def test_what_is_undefined_is_zero() -> None:
    same, other = np.ones(3), np.array([1.0, 2.0, 3.0])
    assert [pearson(same, other), spearman(other, same), pearson(same, same)] == [0.0, 0.0, 0.0]
    zeros, ones = np.zeros(3, int), np.ones(3, int)
    assert [f1(zeros, zeros), matthews(ones, ones), f1(zeros, ones)] == [0.0, 0.0, 0.0]
    assert f1(ones, ones) == 1.0
    empty = np.empty(0)
    assert [measure(empty, empty) for measure in (accuracy, f1, matthews, pearson, spearman)] == [0.0] * 5


def test_measures_of_tasks() -> None:
    said, true = np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1])
    assert metrics_of("mrpc", said, true) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}
    assert list(metrics_of("classification", said, true)) == ["accuracy", "f1", "matthews"]
    assert list(metrics_of("stsb", said, true)) == list(metrics_of("regression", said, true)) == ["pearson", "spearman"]
    assert list(metrics_of("cola", said, true)) == ["matthews"] and list(metrics_of("mnli", said, true)) == ["accuracy"]
    with pytest.raises(ConfigError, match="did you mean cola"):
        metrics_of("coal", said, true)
