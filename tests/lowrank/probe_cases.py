"""Ranks that train with and without probes between their updates."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine.setup import make_engine
from megalowrank.engine.zero import initialize_distributed
from megalowrank.lowrank.factors import folded_weights
from megalowrank.models.architecture import LLAMA_FAMILIES, completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.models.stages import split_layers
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, initialize_groups
from tests.engine.equality_cases import FAMILIES, METHODS, batch, deepspeed_config, method_class

CONFIG = completed(ModelConfig(**FAMILIES["llama"]), LLAMA_FAMILIES, 9)


def build(case: dict[str, Any], groups: Groups | None) -> BuiltModel:
    """The model of a rank, or of one process."""
    kind = method_class("lora")
    method = kind(kind.config_class(**METHODS["lora"]))
    place = None
    if groups is not None:
        blocks = split_layers(CONFIG, method.adapters(), groups.pipe_size)[groups.pipe_rank]
        last = groups.pipe_rank == groups.pipe_size - 1
        place = Placement(groups.wire(), blocks, groups.pipe_rank == 0, last)
    forward = torch.bfloat16 if case.get("bf16") else torch.float32
    return build_model(
        CONFIG, method, length=9, seed=3, recompute=case.get("recompute", False), forward_dtype=forward, place=place
    )


def train(case: dict[str, Any], groups: Groups, probes: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of four updates, and the gradients of the first batch if there are ``probes``."""
    model = build(case, groups)
    config = deepspeed_config(case, groups.data_size)
    engine = make_engine(model, CONFIG, TrainConfig(lr=1e-2), config, groups)
    weights = folded_weights(model.layers)
    names = {id(layer.weight): layer.name for layer in model.layers}
    losses: list[float] = []
    first: dict[str, torch.Tensor] = {}
    for step in range(4):
        own = [batch(step, m).chunk(groups.data_size)[groups.data_rank] for m in range(case["micro"])]
        if probes:
            found: dict[str, torch.Tensor] = {}
            for group in (weights[:3], weights[3:]):
                chosen = [names[id(weight)] for weight in group]
                engine.probe(own, group, lambda i, g, into=found, chosen=chosen: into.update({chosen[i]: g}))
            first = first or found
        result = engine.train_step(own, 1e-2)
        losses += [float(result.loss), float(result.grad_norm)]
    losses.append(float(engine.eval_step(own)))
    engine.close()
    gc.collect()
    return losses, first


def reference(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients on one process, from the whole batch."""
    model = build(case, None)
    found: dict[str, torch.Tensor] = {}
    weights = folded_weights(model.layers)
    names = {id(layer.weight): layer.name for layer in model.layers}
    for weight in weights:
        weight.parameter.requires_grad_(True)
    for module in model.module.modules():
        if hasattr(module, "factors"):
            module.factors = []
    losses = [model.module(batch(0, m)) for m in range(case["micro"])]
    gradients = torch.autograd.grad(sum(losses[1:], losses[0]) / len(losses), [w.parameter for w in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        found[names[id(weight)]] = gradient
    return found


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run by every rank."""
    initialize_distributed(None)
    reports = []
    for case in cases:
        groups = initialize_groups(ParallelConfig(pipeline_model_parallel_size=2 if case.get("pipe") else 1))
        plain, _ = train(case, groups, probes=False)
        probed, gradients = train(case, groups, probes=True)
        expected, worst = reference(case), 0.0
        for name, gradient in gradients.items():
            dist.all_reduce(gradient, group=groups.data)
            worst = max(worst, float((gradient / groups.data_size - expected[name]).abs().max()))
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        reports.append({"same": plain == probed, "worst": worst, "largest": largest})
    return reports
