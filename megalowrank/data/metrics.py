"""How good predictions are: the measures of GLUE, on numpy arrays.

What is undefined (a correlation with something constant, an F1 without positives) is 0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megalowrank.errors import unknown_name

Measure = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of the classes [n] that are right."""
    return float(np.mean(predictions == labels)) if labels.size else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 if there are the classes 0 and 1 only; else the mean of the F1 of all classes that occur."""
    classes = np.union1d(predictions, labels)
    chosen = [1] if classes.size and set(classes.tolist()) <= {0, 1} else classes.tolist()
    return float(np.mean([_f1_of(number, predictions, labels) for number in chosen])) if chosen else 0.0


def _f1_of(number: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    said, true = predictions == number, labels == number
    total = int(said.sum() + true.sum())
    return 2.0 * int((said & true).sum()) / total if total else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of classes [n], of any number of them: the correlation of their indicators."""
    classes = np.union1d(predictions, labels)
    said, true = (values[:, None] == classes for values in (predictions, labels))
    covariances = [_covariance(a, b) for a, b in ((said, true), (said, said), (true, true))]
    return _ratio(*covariances)


def _covariance(x_NC: np.ndarray, y_NC: np.ndarray) -> float:
    """N² times the covariance of two indicators, exact: it is made of integers."""
    together = int((x_NC & y_NC).sum()) * len(x_NC)
    return float(together - int((x_NC.sum(0, dtype=np.int64) * y_NC.sum(0, dtype=np.int64)).sum()))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation of values [n]."""
    if predictions.size == 0 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predictions, labels))
    return _ratio(float(x @ y), float(x @ x), float(y @ y))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks of values [n]; equal values share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[places]


def _ratio(both: float, first: float, second: float) -> float:
    product = float(np.sqrt(first) * np.sqrt(second))
    return float(np.clip(both / product, -1.0, 1.0)) if product else 0.0


_MEASURES: dict[str, Measure] = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip
_OF_TASK: dict[str, Sequence[str]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), ("accuracy",)),
}


def metrics_of(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The measures of ``task`` by name, the main one first.

    ``task`` is "classification", "regression" or a task of GLUE; ``predictions`` [n] are classes, or values in a
    regression, and so are ``labels``. Raises ConfigError for another task.
    """
    if task not in _OF_TASK:
        raise unknown_name("there are no measures of the task", task, _OF_TASK)
    return {name: _MEASURES[name](np.asarray(predictions), np.asarray(labels)) for name in _OF_TASK[task]}
