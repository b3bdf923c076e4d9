"""One look for all figures, and how a figure is written."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megalowrank.errors import ConfigError

MAIN, SECOND, FAINT = "#1f5fa8", "#d1601b", "#9bbcdf"


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fiftieth of the values, narrower at the ends."""
    half, index = len(values) // 100, np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, index[::-1]))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def new_figure(title: str, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of one look: title on the left, light grid, no box."""
    size = (7.2 if columns == 1 else 11.5, 4.2 if rows == 1 else 5.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=rows > 1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for ax in axes.flat:
        ax.grid(True, color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save(figure: Figure, path: Path) -> None:
    """Write a figure and say so; ConfigError if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
    print(f"wrote {path}")
