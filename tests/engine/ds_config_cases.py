"""Ranks that resolve DeepSpeed configurations and train a tiny model under each, in one launch."""

from __future__ import annotations

import gc
import logging
from typing import Any

from megalowrank.config import ParallelConfig, TrainConfig
from megalowrank.engine.dsconfig import resolve
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, initialize_distributed
from megalowrank.parallel.groups import Groups, initialize_groups
from tests.engine.equality_cases import MODEL, batch, build, context

STEPS, LR = 2, 5e-3


def train_each(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses and gradient norms of every case ``{"json": path or object, "bf16": whether --bf16}``."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig())
    reports = []
    for case in cases:
        reports.append(_train(case, groups))
        gc.collect()
    return reports


def _train(case: dict[str, Any], groups: Groups) -> dict[str, Any]:
    flags = TrainConfig(lr=LR, micro_batch_size=1, global_batch_size=4, bf16=case["bf16"], clip_grad=0.5)
    resolved = resolve(case["json"], flags, {"lr", "bf16"}, groups.data_size, MODEL["hidden_size"])
    method, model = build("switchlora", resolved.train.bf16, {})
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = ZeroEngine(model.module, model.layers, VectorClockAdamW(parameters), resolved.deepspeed, groups)
    ctx = context(model, engine, groups.data_rank, groups.data_size)
    method.start(ctx)
    losses, norms = [], []
    for step in range(STEPS):
        method.before_step(step, ctx)
        shares = batch(step, 0).chunk(groups.data_size * resolved.accumulation)
        own = shares[groups.data_rank :: groups.data_size]
        result = engine.train_step(own, LR)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    engine.close()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return {"losses": losses, "norms": norms, "stage": resolved.stage, "accumulation": resolved.accumulation}
