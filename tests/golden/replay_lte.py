"""Recorded runs of LTE: all heads on one process, or each on a rank of its own.

The reference adapts the output projection too, which no flag of ours reaches: here it gets factors by hand. Its mode
``ddp`` averages the loss over heads, so that its gradients are those of a worker divided by H, and so is its epsilon;
``mhlora`` is a single adapter of rank H · r that is never merged.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalowrank.config import ParallelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import host_allocator
from megalowrank.lowrank.linear import LowRankColumnParallelLinear
from megalowrank.methods.base import Context
from megalowrank.methods.lte import LTE
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.heads import join_heads

HEAD = "output.0"
ROWS = 16


def settings(cfg: dict[str, Any], apart: bool = False) -> dict[str, Any]:
    """Flags of a run: every head on a rank of its own, or all on one."""
    if cfg["mode"] == "mhlora":
        count = cfg["heads"]
        return {"lora_rank": count * cfg["r"], "lora_alpha": float(count * cfg["alpha"]), "lte_merge_interval": 10**6}
    where = "lte_heads" if apart else "lte_heads_per_rank"
    shape = {"lora_rank": cfg["r"], "lora_alpha": float(cfg["alpha"]), "lte_merge_interval": cfg["merge"]}
    return {**shape, where: cfg["heads"]}


def adapt_output(method: LTE, model: BuiltModel) -> None:
    """Factors for the output projection, and a forward pass that uses them."""
    output = model.module.output
    output._add_all((method.adapters().spec,))
    output.forward = LowRankColumnParallelLinear.forward.__get__(output)
    (factors,) = output.factors
    factors.name, factors.index = HEAD, len(model.layers)
    model.layers.append(factors)


def fill(method: LTE, model: BuiltModel, drawn: dict[str, np.ndarray], names: Any) -> None:
    """The recorded A of this rank's heads; B is 0."""
    for layer in model.layers:
        name = "lm_head" if layer.name == HEAD else names(layer.name)
        A = torch.from_numpy(drawn[name])
        if method.replica_groups() > 1:
            A = A[method.head]
        layer.A.data.copy_(A.reshape(-1, A.shape[-1]))


def optimizer_of(cfg: dict[str, Any], model: BuiltModel) -> VectorClockAdamW:
    """Adam with the epsilon of a worker."""
    trained = [p for p in model.module.parameters() if p.requires_grad]
    eps = cfg["eps"] * (1 if cfg["mode"] == "mhlora" else cfg["heads"])
    return VectorClockAdamW(trained, betas=(0.9, 0.999), eps=eps)


def every_head(payload: dict[str, Any]) -> tuple[list[float], float]:
    """Replay a run in float64 with every head on a rank of its own: losses before updates, and the validation loss."""
    from tests.golden import replay

    golden = replay.Golden(Path(payload["folder"]), payload["run"])
    cfg = golden.record["cfg"]
    dist.destroy_process_group()
    store = dist.FileStore(f"{payload['store']}", int(os.environ["WORLD_SIZE"]))
    heads = join_heads(cfg["heads"], "gloo", timedelta(seconds=60), store)
    initialize_groups(ParallelConfig(), heads)
    method, model = replay.build(golden, torch.float64, head=heads.head)
    engine = DenseEngine(model.module, model.layers, optimizer_of(cfg, model), 0.0)
    ctx = Context(model.layers, engine.state, 0, cfg["steps"], 0, 1, host_allocator(False), engine=engine, heads=heads)
    method.start(ctx)
    data, losses = np.load(golden.folder / "tiny_llama_data.npz"), []
    for update in range(cfg["steps"]):
        method.before_step(update, ctx)
        batch = torch.from_numpy(data["train"][update]).long().chunk(heads.count)[heads.head]
        losses.append(heads.mean(float(engine.train_step([batch], cfg["lr"]).loss), "a loss"))
    method.settle(ctx)
    return losses, float(engine.eval_step(torch.from_numpy(data["val"]).long().split(ROWS)))
