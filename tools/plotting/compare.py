"""Several runs over each other, and a table of where they ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from megalowrank.errors import ConfigError
from plotting.run import Run
from plotting.style import new_figure, save, smooth

# field of a record, label of its axis, factor to the unit of the label
PANELS = (
    ("loss", "training loss (nats per token)", 1.0),
    ("eval_loss", "held-out loss (nats per token)", 1.0),
    ("lr", "learning rate", 1.0),
    ("tokens_per_second", "tokens per second", 1.0),
    ("memory_bytes", "memory of the first rank (GiB)", 2.0**-30),
)
COLUMNS = ("run", "method", "updates", "tokens", "loss", "held-out", "best held-out", "tokens/s", "GiB")


def compare(runs: Sequence[Run], x: str, out: Path) -> None:
    """Write ``comparison.png`` and print the table; a line for every field that a run does not have.

    ``x`` is updates or tokens. Raises ConfigError if tokens are asked for and a run does not count them.
    """
    names = labels([run.folder for run in runs])
    for name, run in zip(names, runs, strict=True):
        if run.cut:
            print(f"{name}: the last line of metrics.jsonl is cut and left out")
        missing = [field for field, _, _ in PANELS if not len(run.column(field)[0])]
        if missing:
            print(f"{name}: no {', '.join(missing)} in metrics.jsonl")
    print(table(names, runs))
    draw(names, runs, x, out)


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a folder that stands there twice gets a number."""
    paths = [folder.resolve().parts for folder in folders]
    longest = max(map(len, paths))
    depth = next((d for d in range(1, longest) if len({p[-d:] for p in paths}) == len(set(paths))), longest)
    names = ["/".join(path[-depth:]) for path in paths]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def table(names: Sequence[str], runs: Sequence[Run]) -> str:
    """One line per run, columns aligned; a dash where a run has no such number.

    loss is the mean of the last tenth of the records, held-out the last and the best evaluation, tokens/s the median.
    """
    rows = [COLUMNS, *(_row(name, run) for name, run in zip(names, runs, strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: tuple[str, ...], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    return [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]


def _row(name: str, run: Run) -> tuple[str, ...]:
    steps, losses = run.column("loss")
    held_out, tokens, speed, memory = (
        run.column(field)[1] for field in ("eval_loss", "tokens", "tokens_per_second", "memory_bytes")
    )
    return (
        name,
        run.method,
        f"{int(steps[-1])}",
        f"{tokens[-1]:.3g}" if len(tokens) else "-",
        f"{losses[-max(1, len(losses) // 10) :].mean():.4f}",
        f"{held_out[-1]:.4f}" if len(held_out) else "-",
        f"{held_out.min():.4f}" if len(held_out) else "-",
        f"{np.median(speed):,.0f}" if len(speed) else "-",
        f"{memory.max() * 2.0**-30:.2f}" if len(memory) else "-",
    )


def draw(names: Sequence[str], runs: Sequence[Run], x: str, out: Path) -> None:
    """One panel per field, the legend in the last place."""
    figure, axes = new_figure("Comparison", rows=2, columns=3)
    colors = plt.get_cmap("tab10")
    for ax, (field, label, factor) in zip(axes, PANELS, strict=False):
        for i, run in enumerate(runs):
            steps, values = run.column(field)
            values = smooth(values) if field == "loss" else values
            marker = "o" if field == "eval_loss" else ""
            style = ("-", "--", ":", "-.")[i // 10 % 4]
            look = {"color": colors(i % 10), "linestyle": style, "linewidth": 1.5, "marker": marker, "markersize": 3}
            ax.plot(horizontal(run, steps, x), values * factor, **look)
        ax.set(xlabel=x, ylabel=label)
        ax.tick_params(labelbottom=True)
    lines = axes[0].get_lines()
    texts = [f"{name}: {run.title}" for name, run in zip(names, runs, strict=True)]
    axes[-1].legend(lines, texts, frameon=False, loc="upper left", fontsize=8)
    axes[-1].axis("off")
    save(figure, out / "comparison.png")


def horizontal(run: Run, steps: np.ndarray, x: str) -> np.ndarray:
    """Updates, or the tokens seen by then, for the records of an update between two log lines in between."""
    if x == "updates":
        return steps
    at, tokens = run.column("tokens")
    if not len(at):
        raise ConfigError(f"{run.folder / 'metrics.jsonl'} does not count tokens", None, "--x updates")
    return np.interp(steps, at, tokens)
