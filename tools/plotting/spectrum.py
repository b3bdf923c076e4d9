"""Singular values of the change of the weights between the start of a run and a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.errors import ConfigError
from megalowrank.lowrank.fold import join_residual
from megalowrank.parallel.rng import generator
from plotting.run import Run
from plotting.style import new_figure, save

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
SMALL = 0.01
_MATRIX = re.compile(r"weight/(layers\.(\d+)\.\w+\.(\w+))\.weight|master/(layers\.(\d+)\.\w+\.(\w+))\.weight")


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
