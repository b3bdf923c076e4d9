"""Weights of a checkpoint, merged: the same function as the run that was saved, whatever method trained it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.config import ModelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.loop import Position
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.errors import ConfigError
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_single_process
from tests.engine.equality_cases import MODEL, batch, build
from tests.engine.resume_cases import Process, save_now

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"lora_alpha": 3.0}),
    "switchlora": ("switchlora", {}),
    "relora": ("relora", {}),
    "golore": ("golore", {}),
}


def train_and_save(method_name: str, flags: dict[str, Any], low: bool, folder: Path) -> BuiltModel:
    """Four updates, then a checkpoint."""
    groups = initialize_single_process(str(folder / "store"))
    case = {"method": method_name, "flags": flags, "bf16": low}
    method, model = build(method_name, low, flags)
    if low:
        model.module.bfloat16()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    process = Process(case, model, method, engine, groups)
    process.state.run["model"] = asdict(ModelConfig(**MODEL))
    process.state.run["method"] = method_name
    process.advance(0, 4)
    save_now(process.state, folder, Position(4, 4))
    return model


def reload(folder: Path) -> BuiltModel:
    saved = SavedWeights.open(folder)
    plain = build_llama(saved.model_config(), FullRank(FullRankConfig()), length=9, seed=99, initial=saved.read)
    saved.check_covered({tensor.name for tensor in plain.tensors})
    return plain


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_the_merged_model_is_the_trained_one(name: str, low: bool, tmp_path: Path) -> None:
    with torch.enable_grad():
        model = train_and_save(*RUNS[name], low, tmp_path)
    plain = reload(tmp_path)
    assert not plain.layers
    tokens = batch(7, 0)[:, :-1]
    expected, found = model.module.logits(tokens).float(), plain.module.logits(tokens)
    assert (found - expected).abs().max() < (2e-5 if not low else 0.05 * expected.abs().max())
    start = build_llama(ModelConfig(**MODEL), FullRank(FullRankConfig()), length=9, seed=3).module.logits(tokens)
    assert (found - start).abs().max() > 0.02, "training must have changed something"


def test_bf16_weights_come_with_their_residual(tmp_path: Path) -> None:
    model = train_and_save("relora", {}, True, tmp_path)
    plain = {tensor.name: tensor for tensor in reload(tmp_path).tensors}
    layer = model.layers[0]
    name = f"{layer.name}.weight"
    W = layer.weight.value()[: layer.out_features * layer.in_features].view(layer.out_features, -1)
    masters = SavedWeights.open(tmp_path).checkpoint
    A, Bt = (masters.read(f"master/{layer.name}.{side}").view(layer.rank, -1) for side in "AB")
    flat = plain[name].parameter.data.view(-1)[plain[name].start :][: W.numel()].view_as(W)
    assert torch.allclose(flat, W + layer.scale * Bt.t() @ A, atol=1e-7)
    assert (W - W.bfloat16().float()).abs().max() > 0


def test_another_shape_and_another_depth_are_named(tmp_path: Path) -> None:
    train_and_save("full", {}, False, tmp_path)
    saved = SavedWeights.open(tmp_path)
    with pytest.raises(ConfigError, match="lacks layers.9.mlp.up.weight"):
        saved.read("layers.9.mlp.up.weight", (17, 12))
    with pytest.raises(ConfigError, match="embedding.weight in the checkpoint step_00000004 has another shape"):
        saved.read("embedding.weight", (30, 12))
    with pytest.raises(ConfigError, match="a weight that the model lacks: layers.1.mlp.up.weight"):
        saved.check_covered(saved.names - {"layers.1.mlp.up.weight"})
    saved.run["model"]["widgets"] = 3
    with pytest.raises(ConfigError, match="another version; got unknown widgets"):
        saved.model_config()
