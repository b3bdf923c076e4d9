"""Pictures of one run: loss, schedule, switches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plotting.run import Run
from plotting.style import FAINT, MAIN, SECOND, new_figure, save, smooth

SWITCHED = "switched_vectors"


def draw_loss(run: Run, out: Path) -> None:
    """Training loss raw and smoothed, evaluations, and the loss of a unigram model if run.json has it."""
    figure, (ax,) = new_figure(f"Loss: {run.title}")
    steps, losses = run.column("loss")
    smoothed = len(losses) >= 100
    ax.plot(steps, losses, color=FAINT if smoothed else MAIN, linewidth=1.0, label="training")
    if smoothed:
        ax.plot(steps, smooth(losses), color=MAIN, linewidth=2.0, label="training, smoothed")
    steps, losses = run.column("eval_loss")
    if len(steps):
        ax.plot(steps, losses, "o-", color=SECOND, markersize=4, linewidth=1.0, label="evaluation")
    if "unigram_loss" in run.config:
        level = run.field("unigram_loss", kind=(int, float))
        ax.axhline(level, color="#555555", linestyle="--", linewidth=1.2, label=f"unigram model ({level:.2f})")
    ax.set(xlabel="update", ylabel="loss (nats per token)")
    ax.legend(frameon=False)
    save(figure, out / "loss.png")


def draw_schedule(run: Run, out: Path) -> None:
    """Learning rate and, if the run switched, vectors switched since the last log line."""
    switched = run.column(SWITCHED)
    figure, axes = new_figure(f"Schedule: {run.title}", rows=2 if len(switched[0]) else 1)
    axes[0].plot(*run.column("lr"), color=MAIN, linewidth=2.0, label="learning rate")
    axes[0].set(ylabel="learning rate")
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(switched[0]):
        axes[1].plot(*switched, color=SECOND, linewidth=1.5, label="switched vectors")
        axes[1].set(ylabel="vectors per log line", ylim=(0, None))
    for ax in axes:
        ax.legend(frameon=False)
    axes[-1].set(xlabel="update")
    save(figure, out / "schedule.png")


def draw_switches(run: Run, out: Path) -> None:
    """All vectors switched so far; nothing for a run that does not count them."""
    steps, switched = run.column(SWITCHED)
    if not len(steps):
        return
    figure, (ax,) = new_figure(f"Switches: {run.title}")
    total = np.cumsum(switched)
    ax.plot(steps, total, color=SECOND, linewidth=2.0, label=f"{int(total[-1]):,} vectors in all")
    ax.fill_between(steps, total, color=SECOND, alpha=0.12, linewidth=0)
    ax.set(xlabel="update", ylabel="vectors switched since the start", ylim=(0, None))
    ax.legend(frameon=False, loc="upper left")
    save(figure, out / "switches.png")
