"""Models and checkpoints without factors: what converters start from and end with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalowrank import __version__
from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.checkpoint.write import SoloRanks, save_checkpoint
from megalowrank.config import DataConfig, ModelConfig, TrainConfig
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.models.build import BuiltModel, Initial, build_model


def build_plain(config: ModelConfig, length: int, initial: Initial) -> BuiltModel:
    """A model of ``initial`` weights without factors, float32, on the CPU, in evaluation mode.

    ``config`` is a completed one, ``length`` the longest sequence. A process group of one has to exist.
    """
    config = dataclasses.replace(config, norm_impl="torch")
    model = build_model(config, FullRank(FullRankConfig()), length=length, seed=0, initial=initial)
    model.module.eval()
    return model


def load_plain(saved: SavedWeights) -> BuiltModel:
    """The model of a checkpoint with everything merged; ConfigError if it is damaged or of another model."""
    model = build_plain(saved.model_config(), int(saved.run["train"]["seq_length"]), saved.read)
    saved.check_covered({tensor.name for tensor in model.tensors})
    return model


def save_weights(
    root: Path, step: int, weights: Mapping[str, torch.Tensor], run: dict[str, Any], origin: dict[str, Any]
) -> None:
    """Write a checkpoint in ``root`` that has weights alone, by their names in files: a start for ``--finetune``.

    ``origin`` says where the weights come from. Raises TrainingError if the disk fails.
    """
    state = {"attempts": step, "updates": step, "method_state": {}, "run": run, "origin": origin}
    save_checkpoint(root, step, [Piece.whole(name, value) for name, value in weights.items()], state, SoloRanks())


def save_merged(saved: SavedWeights, root: Path) -> None:
    """Write a checkpoint of full-rank training in ``root`` with s·B·A of ``saved`` merged into W in float32."""
    shapes = {name: _shape(saved, name) for name in sorted(saved.names)}
    weights = {f"master/{name}": saved.read(name, shape) for name, shape in shapes.items()}
    method = FullRank.name
    run = {**saved.run, "train": {**saved.run["train"], "method": method}, "method": method, "method_config": {}}
    save_weights(root, saved.checkpoint.step, weights, run, origin(saved))


def new_run(
    config: ModelConfig, length: int, tokenizer: str | None, method: str, method_config: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says about its run where there was none."""
    return {
        "model": dataclasses.asdict(config),
        "train": dataclasses.asdict(TrainConfig(method=method, seq_length=length)),
        "data": dataclasses.asdict(DataConfig(tokenizer_model=tokenizer)),
        "method": method,
        "method_config": method_config,
        "versions": {"megalowrank": __version__, "torch": str(torch.__version__)},
    }


def origin(saved: SavedWeights) -> dict[str, Any]:
    """Method, rank, scale, updates, tokens and last losses of the training that made the weights, as JSON values.

    Losses come from ``metrics.jsonl`` where it still lies by the checkpoint, in the folder above or in the output
    folder of the run; without it they are left out.
    """
    found = saved.checkpoint.state.get("origin")
    if found is not None:
        return dict(found)
    run, step = saved.run, saved.checkpoint.step
    found = {"method": run["method"], "updates": step}
    if saved.adapters is not None:
        found.update(rank=saved.adapters.spec.rank, scale=saved.adapters.spec.scale)
    batch = run["train"].get("global_batch_size")
    if batch:
        found["tokens"] = step * batch * run["train"]["seq_length"]
    return {**found, **_losses(saved), "version": run.get("versions", {}).get("megalowrank", "unknown")}


def _losses(saved: SavedWeights) -> dict[str, float]:
    root = saved.checkpoint.path.parent
    folders = [root, root.parent]
    if named := saved.run.get("output", {}).get("output_dir"):
        folders.append(Path(named))
    path = next((folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()), None)
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path else ():
        record = _record(line)
        if record.get("step", saved.checkpoint.step + 1) <= saved.checkpoint.step:
            found.update({name: record[name] for name in ("loss", "eval_loss") if name in record})
    return found


def _record(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _shape(saved: SavedWeights, name: str) -> tuple[int, ...]:
    kind = "master" if f"master/{name}" in saved.checkpoint.names() else "weight"
    return tuple(saved.checkpoint.shape(f"{kind}/{name}"))
