"""Heads one after the other on one dense process, with the merge written out matrix by matrix."""

from __future__ import annotations

from typing import Any

import torch

from megalowrank.checkpoint.shards import RunTensors
from megalowrank.config import ModelConfig, TrainConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.setup import make_optimizer
from megalowrank.methods.lte import LTE, LTEConfig
from megalowrank.models.architecture import FAMILIES as KNOWN
from megalowrank.models.architecture import completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.models.stages import split_layers
from megalowrank.models.transformer import Placement
from tests.engine.layout_cases import FAMILIES, LENGTH, SEED, alone, batch
from tests.engine.whole_runs import Tensors, logical

STEPS, LR = 7, 3e-3
FLAGS: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 6.0, "lte_merge_interval": 2}


def train_config() -> TrainConfig:
    return TrainConfig(lr=LR, weight_decay=0.1, adam_eps=1e-4)


def model_of(
    case: dict[str, Any], head: int, place: Placement | None = None, stages: int = 1
) -> tuple[LTE, BuiltModel]:
    """The method and the model of a head, or this rank's part of it."""
    method = LTE(LTEConfig(**{**FLAGS, "lte_heads": case["heads"], **case.get("flags", {})}))
    method.head = head
    config = completed(ModelConfig(**FAMILIES["llama"]), KNOWN, LENGTH)
    if place is not None and stages > 1:
        first = 0 if place.begins else 1
        blocks = split_layers(config, method.adapters(), stages)[first]
        place = Placement(place.wire, blocks, place.begins, place.ends)
    forward = torch.bfloat16 if case.get("bf16") else None
    return method, build_model(config, method, length=LENGTH, seed=SEED, forward_dtype=forward, place=place)


def reference(case: dict[str, Any]) -> dict[str, Any]:
    """H workers that share nothing, and between updates the merge, written out matrix by matrix."""
    built = [model_of({**case, "flags": {**case.get("flags", {}), "lte_merge_interval": 10**6}}, h)
             for h in range(case["heads"])]  # fmt: skip
    models = [model for _, model in built]
    engines = [
        DenseEngine(m.module, m.layers, make_optimizer(m.module, train_config()), case.get("clip", 0.0)) for m in models
    ]
    interval, losses = {**FLAGS, **case.get("flags", {})}["lte_merge_interval"], []
    plain = case.get("flags", {}).get("lte_plain", "frozen")
    snapshots = [[torch.zeros(layer.out_features, layer.in_features) for layer in model.layers] for model in models]
    for step in range(STEPS):
        if step and step % interval == 0:
            snapshots = merge(models, snapshots)
        losses.append(float(torch.stack([backward(m, tokens_of(step, case, h)) for h, m in enumerate(models)]).mean()))
        if plain == "synchronous":
            average([[p.grad for p in others(model)] for model in models])
        for engine in engines:
            engine.train_step([], LR)
    tensors: Tensors = {}
    for head, ((method, model), engine) in enumerate(zip(built, engines, strict=True)):
        for name, tensor in logical(RunTensors(model, engine.state, method, alone()), 1).items():
            tensors[name if name.startswith("weight/") else f"head{head}/{name}"] = tensor
    return {"losses": losses, "tensors": tensors, "evaluated": evaluated(models, snapshots)}


def tokens_of(step: int, case: dict[str, Any], head: int) -> list[torch.Tensor]:
    return [tokens.chunk(case["heads"])[head] for tokens in batch(step)]


def backward(model: BuiltModel, micro_batches: list[torch.Tensor]) -> torch.Tensor:
    """Leave the gradient of the mean loss in the parameters."""
    losses = [model.module(tokens) / len(micro_batches) for tokens in micro_batches]
    for loss in losses:
        loss.backward()
    return torch.stack(losses).sum().detach()


def others(model: BuiltModel) -> list[torch.nn.Parameter]:
    """Trained parameters that are no factors."""
    factors = {id(p) for layer in model.layers for p in (layer.A, layer.Bt)}
    return [p for p in model.module.parameters() if p.requires_grad and id(p) not in factors]


@torch.no_grad()
def average(tensors: list[list[torch.Tensor]]) -> None:
    """Give every head the mean of all, tensor by tensor."""
    for same in zip(*tensors, strict=True):
        mean = torch.stack(list(same)).mean(0)
        for tensor in same:
            tensor.copy_(mean)


def product(model: BuiltModel, index: int) -> torch.Tensor:
    """s · B A of a matrix as it is now."""
    layer = model.layers[index]
    return layer.scale * layer.Bt.detach().t() @ layer.A.detach()


@torch.no_grad()
def merge(models: list[BuiltModel], snapshots: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The mean of what heads have learned goes into W of all; returns what is subtracted from now on.

    The rest is averaged.
    """
    average([[p.data for p in others(model)] for model in models])
    found = [[product(model, i) for i in range(len(model.layers))] for model in models]
    for i in range(len(models[0].layers)):
        mean = sum(found[h][i] - snapshots[h][i] for h in range(len(models))) / len(models)
        for model in models:
            layer = model.layers[i]
            rows = slice(layer.row_start, layer.row_start + layer.out_features)
            layer.weight.parameter.data[rows] += mean
            layer.fixed[0].parameter.data.copy_(layer.A)
            layer.fixed[1].parameter.data.copy_(layer.Bt)
    return found


@torch.no_grad()
def evaluated(models: list[BuiltModel], snapshots: list[list[torch.Tensor]]) -> float:
    """The loss of the first batch of W with the mean of all heads in it; it changes the models."""
    merge(models, snapshots)
    return float(torch.stack([models[0].module(tokens) for tokens in batch(0)]).mean())
