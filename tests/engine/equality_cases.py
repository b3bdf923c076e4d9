"""Ranks of the equality matrix: the same run under DeepSpeed and on one dense, unsharded process."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalowrank.config import ModelConfig, ParallelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.methods import method_class
from megalowrank.methods.base import Context, Method
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_groups

STEPS, LR = 6, 5e-3
MODEL = {
    "num_layers": 2, "hidden_size": 12, "ffn_hidden_size": 17, "num_attention_heads": 2, "num_query_groups": 1,
    "vocab_size": 29,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 5, "lora_init": "classic"},
    "switchlora": {"lora_rank": 5, "switch_interval": 4, "switch_freeze_steps": 2, "switch_descent_rate": 1.0},
}


def batch(step: int, micro: int, rows: int = 4) -> torch.Tensor:
    """Global micro-batch ``micro`` of ``step``: [rows, 10] tokens, the same on every rank."""
    source = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, MODEL["vocab_size"], (rows, 10), generator=source)


def build(method_name: str, low: bool, overrides: dict[str, Any]) -> tuple[Method, BuiltModel]:
    kind = method_class(method_name)
    method = kind(kind.config_class(**{**METHODS[method_name], **overrides}))
    config = ModelConfig(**MODEL)
    forward = torch.bfloat16 if low else torch.float32
    return method, build_llama(config, method, length=9, seed=3, forward_dtype=forward)


def context(model: BuiltModel, engine: Engine, rank: int, world: int) -> Context:
    return Context(model.layers, engine.state, 3, STEPS, rank, world, host_allocator(False))


def snapshot(model: BuiltModel, engine: Engine, method: Method, sharded: bool) -> dict[str, torch.Tensor]:
    """Whole masters, moments, weights and pools, assembled over ranks."""
    found: dict[str, torch.Tensor] = {}
    for partition in engine.state.partitions:
        for fragment in partition.fragments:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                flat = getattr(partition, kind)[fragment.offset : fragment.offset + fragment.numel].cpu()
                found.setdefault(f"{kind}", torch.zeros(0))
                name = next(n for n, p in model.module.named_parameters() if p is fragment.parameter)
                size = int(np.prod(getattr(fragment.parameter, "ds_shape", fragment.parameter.shape)))
                whole = found.setdefault(f"{kind}/{name}", torch.zeros(size))
                whole[fragment.start : fragment.start + fragment.numel] = flat
    for saved in method.saved_tensors():
        whole = torch.zeros(saved.shape)
        whole[saved.first :: saved.step] = saved.rows
        found[f"pool/{saved.name}"] = whole
    names = [f"{kind}/{n}" for n, p in model.module.named_parameters() if p.requires_grad
             for kind in ("master", "exp_avg", "exp_avg_sq")]  # fmt: skip
    for name in names:
        parameter = dict(model.module.named_parameters())[name.split("/", 1)[1]]
        size = int(np.prod(getattr(parameter, "ds_shape", parameter.shape)))
        found.setdefault(name, torch.zeros(size))
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        found.pop(kind, None)
    if sharded and dist.get_world_size() > 1:
        for name in sorted(found):
            if engine.state.masters_sharded or name.startswith("pool/"):
                dist.all_reduce(found[name])
    for layer in model.layers:
        found[f"weight/{layer.name}"] = whole_weight(layer)
    found["births"] = torch.from_numpy(engine.state.clocks.births.copy())
    return found


def whole_weight(layer: Any) -> torch.Tensor:
    """The folded W with its residual, assembled over ranks."""
    piece = layer.weight.locate()
    value = layer.weight.value().float().cpu()
    size = layer.weight.out_features * layer.weight.in_features
    if value.numel() == size:
        return value.clone()
    whole = torch.zeros(size)
    whole[piece.start : piece.start + value.numel()] = value
    dist.all_reduce(whole)
    return whole


def train(engine: Engine, method: Method, ctx: Context, micro: int, rank: int, world: int, mean: bool) -> list[float]:
    """STEPS updates; ``mean`` gives a dense process the ranks' shares as micro-batches."""
    losses = []
    for step in range(STEPS):
        method.before_step(step, ctx)
        whole = [batch(step, m) for m in range(micro)]
        if mean:
            share = [b.chunk(dist.get_world_size())[r] for b in whole for r in range(dist.get_world_size())]
        else:
            share = [b.chunk(world)[rank] for b in whole]
        losses.append(float(engine.train_step(share, LR).loss))
    return losses


def dense(case: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    low = case.get("bf16", False)
    method, model = build(case["method"], low, case.get("flags", {}))
    if low:
        model.module.bfloat16()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), case.get("clip", 0.0))
    ctx = context(model, engine, 0, 1)
    method.start(ctx)
    losses = train(engine, method, ctx, case.get("micro", 1), 0, 1, mean=True)
    return losses, snapshot(model, engine, method, False)


def deepspeed_config(case: dict[str, Any], world: int) -> dict[str, Any]:
    zero = {"stage": case["stage"], "memory_efficient_linear": False, **case.get("zero", {})}
    return {
        "train_batch_size": 4 * case.get("micro", 1),
        "train_micro_batch_size_per_gpu": 4 // world,
        "gradient_accumulation_steps": case.get("micro", 1),
        "gradient_clipping": case.get("clip", 0.0),
        "bf16": {"enabled": case.get("bf16", False), "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def sharded(case: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    groups = initialize_groups(ParallelConfig())
    method, model = build(case["method"], case.get("bf16", False), case.get("flags", {}))
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = VectorClockAdamW(parameters)
    engine = ZeroEngine(model.module, model.layers, optimizer, deepspeed_config(case, groups.data_size), groups)
    ctx = context(model, engine, groups.data_rank, groups.data_size)
    method.start(ctx)
    losses = train(engine, method, ctx, case.get("micro", 1), groups.data_rank, groups.data_size, mean=False)
    found = snapshot(model, engine, method, True)
    engine.close()
    gc.collect()
    return losses, found


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Largest absolute difference per kind of tensor, for every case."""
    initialize_distributed(None)
    initialize_groups(ParallelConfig())
    report = []
    for case in cases:
        losses, found = sharded(case)
        expected_losses, expected = dense(case)
        worst: dict[str, float] = {"loss": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))}
        for name, tensor in expected.items():
            kind = name.split("/")[0]
            difference = float((found[name].double() - tensor.double()).abs().max()) if tensor.numel() else 0.0
            worst[kind] = max(worst.get(kind, 0.0), difference)
        report.append({"case": case, "worst": worst, "moved": float(expected_losses[0] - expected_losses[-1])})
    return report
