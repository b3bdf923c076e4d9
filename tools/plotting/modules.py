"""Which modules of a run were on, from reallocation to reallocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap

from plotting.run import Run
from plotting.style import MAIN, new_figure, save

ORDER = ("q", "k", "v", "o", "gate", "up", "down", "residual_1", "residual_2", "cross_in", "cross_cut")


def draw_modules(run: Run, out: Path) -> None:
    """A heat map, module by reallocation, with how often each was on; nothing for a run without reallocations."""
    events: list[dict[str, Any]] = [e for e in run.records if e.get("event") == "reallocation" and "on" in e]
    if not events:
        return
    names = _ordered({**events[0]["on"], **events[0]["off"]})
    on = np.array([[name in event["on"] for event in events] for name in names])
    figure, (ax,) = new_figure(f"Modules that are on: {run.title}")
    figure.set_size_inches(max(7.2, 0.12 * len(events) + 4.0), max(4.2, 0.14 * len(names) + 1.2))
    ax.imshow(on, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#f2f2f2", MAIN]), vmin=0, vmax=1)
    ax.grid(False)
    ax.set_yticks(range(len(names)), [name.removeprefix("layers.") for name in names], fontsize=6)
    shares = ax.secondary_yaxis("right")
    shares.set_yticks(range(len(names)), [f"{share:.0%}" for share in on.mean(1)], fontsize=6)
    shown = np.unique(np.linspace(0, len(events) - 1, min(len(events), 12)).round().astype(int))
    ax.set_xticks(shown, [str(events[i]["step"]) for i in shown])
    ax.set(xlabel="update of the reallocation; on the right how often a module was on")
    save(figure, out / "modules.png")


def _ordered(names: dict[str, float]) -> list[str]:
    """By block, in the order of computation."""
    return sorted(names, key=lambda name: (int(name.split(".")[1]), ORDER.index(name.rsplit(".", 1)[-1])))
