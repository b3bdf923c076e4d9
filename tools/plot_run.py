"""Draw what a run did: loss, schedule, switches, and the singular values of the change of its weights."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.engine.metrics import read_metrics
from megalowrank.errors import ConfigError, run_main
from megalowrank.lowrank.fold import join_residual
from megalowrank.parallel.rng import generator

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
SWITCHED = "switched_vectors"
SMALL = 0.01
_MATRIX = re.compile(r"weight/(layers\.(\d+)\.\w+\.(\w+))\.weight|master/(layers\.(\d+)\.\w+\.(\w+))\.weight")
_MAIN, _SECOND, _FAINT = "#1f5fa8", "#d1601b", "#9bbcdf"


@dataclass(frozen=True)
class Run:
    """A run folder: its resolved configuration (run.json) and its records (metrics.jsonl)."""

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> Run:
        """Raises ConfigError if the files are missing, damaged or without any update."""
        path = folder / "run.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is not JSON") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} is not the configuration of a run")
        records = read_metrics(folder / "metrics.jsonl")
        run = Run(folder, config, records)
        if not len(run.column("loss")[0]):
            raise ConfigError(f"{folder / 'metrics.jsonl'} has no update with a loss")
        return run

    def field(self, *names: str, kind: type | tuple[type, ...]) -> Any:
        """A value of run.json; ConfigError if it is missing or of another type."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.folder / 'run.json'} has no valid {'.'.join(names)}", repr(value))
        return value

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have a number called ``name``."""
        found = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), (int, float))]
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @property
    def title(self) -> str:
        """Method and size, for the head of a figure."""
        model = self.config.get("model")
        model = model if isinstance(model, dict) else {}
        size = model.get("preset") or f"{model.get('num_layers')} blocks of width {model.get('hidden_size')}"
        rank = self.config.get("method_config")
        rank = rank.get("lora_rank") if isinstance(rank, dict) else None
        return f"{self.config.get('method')}, {size}" + (f", r = {rank}" if rank else "")


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


def draw_loss(run: Run, out: Path) -> None:
    """Training loss raw and smoothed, evaluations, and the loss of a unigram model if run.json has it."""
    figure, (ax,) = new_figure(f"Loss: {run.title}")
    steps, losses = run.column("loss")
    smoothed = len(losses) >= 100
    ax.plot(steps, losses, color=_FAINT if smoothed else _MAIN, linewidth=1.0, label="training")
    if smoothed:
        ax.plot(steps, smooth(losses), color=_MAIN, linewidth=2.0, label="training, smoothed")
    steps, losses = run.column("eval_loss")
    if len(steps):
        ax.plot(steps, losses, "o-", color=_SECOND, markersize=4, linewidth=1.0, label="evaluation")
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
    axes[0].plot(*run.column("lr"), color=_MAIN, linewidth=2.0, label="learning rate")
    axes[0].set(ylabel="learning rate")
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(switched[0]):
        axes[1].plot(*switched, color=_SECOND, linewidth=1.5, label="switched vectors")
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
    ax.plot(steps, total, color=_SECOND, linewidth=2.0, label=f"{int(total[-1]):,} vectors in all")
    ax.fill_between(steps, total, color=_SECOND, alpha=0.12, linewidth=0)
    ax.set(xlabel="update", ylabel="vectors switched since the start", ylim=(0, None))
    ax.legend(frameon=False, loc="upper left")
    save(figure, out / "switches.png")


def chosen_matrices(names: Sequence[str]) -> list[str]:
    """One matrix of each kind in the first and in the last block, in that order."""
    found: dict[tuple[int, str], str] = {}
    for match in filter(None, map(_MATRIX.fullmatch, names)):
        name, block, kind = (match[1], match[2], match[3]) if match[1] else (match[4], match[5], match[6])
        found[int(block), kind] = name
    blocks = [block for block, _ in found]
    ends = sorted({min(blocks), max(blocks)}) if blocks else []
    return [found[block, kind] for block in ends for kind in KINDS if (block, kind) in found]


def weight_change(run: Run, checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Effective weight in the checkpoint minus the one at the start, float64 [out, in].

    The start is drawn again as ``models.build`` draws it; s·B·A is part of the effective weight at both ends.
    """
    names = checkpoint.names()
    lowrank = f"master/{name}.A" in names
    key = f"{'weight' if lowrank else 'master'}/{name}.weight"
    shape = checkpoint.shape(key)
    std, seed = run.field("model", "init_method_std", kind=(int, float)), run.field("train", "seed", kind=int)
    if len(shape) != 2:
        raise ConfigError(f"{key} in {checkpoint.path} is no matrix", shape)
    start = torch.empty(shape[0] * shape[1]).normal_(0.0, std, generator=generator(seed, f"{name}.weight"))
    if run.field("train", "bf16", kind=bool) and not lowrank:
        start = start.bfloat16().float()
    end = checkpoint.read(key)
    if lowrank and f"residual/{name}.weight" in names:
        end = join_residual(end, checkpoint.read(f"residual/{name}.weight"))
    change = (end.double() - start.double()).view(shape)
    if lowrank:
        rank = run.field("method_config", "lora_rank", kind=int)
        scale = run.field("method_config", "lora_alpha", kind=(int, float)) / rank
        change += scale * (_factor(checkpoint, name, "B", (rank, shape[0])).t()
                           @ _factor(checkpoint, name, "A", (rank, shape[1])))  # fmt: skip
    return change


def _factor(checkpoint: Checkpoint, name: str, factor: str, shape: tuple[int, int]) -> torch.Tensor:
    key = f"master/{name}.{factor}"
    if checkpoint.shape(key) != shape:
        raise ConfigError(f"{key} in {checkpoint.path} does not fit run.json", checkpoint.shape(key), shape)
    return checkpoint.read(key).double().view(shape)


def spectra(run: Run, checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Singular values of the change of the chosen matrices, largest first; ConfigError if there are none."""
    chosen = chosen_matrices(checkpoint.names())
    if not chosen:
        raise ConfigError(f"{checkpoint.path} has no weights of transformer blocks")
    for name in chosen:
        yield name, torch.linalg.svdvals(weight_change(run, checkpoint, name)).numpy()


def effective_rank(values: np.ndarray) -> int:
    """How many singular values are above 1 % of the largest."""
    return int((values > SMALL * values[0]).sum())


def draw_spectrum(run: Run, checkpoint: Checkpoint, out: Path) -> None:
    """Singular values of the change of W over the largest one, and the effective ranks as lines of text.

    Factors that start at zero change W by rank r at most; those that start at random and are taken out of W, 2r.
    """
    found = list(spectra(run, checkpoint))
    method = run.config.get("method_config")
    method = method if isinstance(method, dict) else {}
    rank = method.get("lora_rank")
    blocks = list(dict.fromkeys(name.split(".")[1] for name, _ in found))
    figure, axes = new_figure(f"Change of W at update {checkpoint.step}: {run.title}", columns=len(blocks))
    colors = plt.get_cmap("tab10")
    for name, values in found:
        ax, kind = axes[blocks.index(name.split(".")[1])], name.rsplit(".", 1)[-1]
        reached = effective_rank(values)
        print(f"{name}: effective rank {reached} of {len(values)}" + (f" (r = {rank})" if rank else ""))
        if reached:
            label = f"{kind}: {reached} above {SMALL:.0%}"
            heights = np.maximum(values / values[0], 1e-8)
            ax.plot(np.arange(1, len(values) + 1), heights, color=colors(KINDS.index(kind)), linewidth=1.6, label=label)
    for ax, block in zip(axes, blocks, strict=True):
        ax.axhline(SMALL, color="#999999", linestyle=":", linewidth=1.2)
        if rank:
            ax.axvline(rank, color="#333333", linestyle="--", linewidth=1.2, label=f"r = {rank}")
        if rank and method.get("lora_init") == "switchlora":
            ax.axvline(2 * rank, color="#333333", linestyle=":", linewidth=1.2, label="2r: reach without switches")
        ax.set(yscale="log", xlabel="index of the singular value", ylabel="singular value / largest")
        ax.set(title=f"block {block}", ylim=(1e-5, 1.6))
        ax.legend(frameon=False, fontsize=8)
    save(figure, out / "spectrum.png")


def find_checkpoint(run: Run, given: Path | None) -> Checkpoint | None:
    """The checkpoint that was asked for, else the newest that the run saved, if any."""
    if given is not None:
        return Checkpoint.open(given)
    output = run.config.get("output")
    saved = output.get("save") if isinstance(output, dict) else None
    return Checkpoint.open(Path(saved)) if isinstance(saved, str) and (Path(saved) / "latest").exists() else None


def main() -> None:
    """Command line of ``plot_run``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="folder with run.json and metrics.jsonl")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint, or folder of them; default: --save of the run")
    parser.add_argument("--out", type=Path, help="folder of the images; default: the run's folder")
    args = parser.parse_args()
    run, out = Run.read(args.run_dir), args.out or args.run_dir
    checkpoint = find_checkpoint(run, args.checkpoint)
    draw_loss(run, out)
    draw_schedule(run, out)
    draw_switches(run, out)
    if checkpoint is None:
        print("spectrum: the run has saved no checkpoint; name one with --checkpoint")
    else:
        draw_spectrum(run, checkpoint, out)


if __name__ == "__main__":
    run_main(main)
