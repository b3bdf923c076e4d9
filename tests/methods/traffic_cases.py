"""Rank functions of test_traffic.py."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megalowrank.config import ParallelConfig
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, initialize_distributed
from megalowrank.parallel.groups import initialize_groups
from tests.engine.equality_cases import LR, STEPS, batch, build, context, deepspeed_config


def counting(original: Any, elements: list[int]) -> Any:
    """``original`` with a note of the size of every call."""

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        elements.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    return counted


def collectives_of_switching(stages: list[int]) -> list[dict[str, Any]]:
    """Per stage: the all-reduces of every ``before_step``, and this rank's pool bytes beside the whole pool's."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig())
    report = []
    for stage in stages:
        method, model = build("switchlora", False, {})
        parameters = [p for p in model.module.parameters() if p.requires_grad]
        settings = deepspeed_config({"stage": stage}, groups.data_size)
        engine = ZeroEngine(model.module, model.layers, VectorClockAdamW(parameters), settings, groups)
        ctx = context(model, engine, groups.data_rank, groups.data_size)
        method.start(ctx)
        calls, elements = [], []
        original = dist.all_reduce
        for step in range(STEPS):
            elements.clear()
            dist.all_reduce = counting(original, elements)
            method.before_step(step, ctx)
            dist.all_reduce = original
            calls.append(list(elements))
            engine.train_step([batch(step, 0).chunk(groups.data_size)[groups.data_rank]], LR)
        whole = sum(int(n) * int(length) for n, length in zip(method.pools.slots, method.pools.lengths, strict=True))
        report.append({"calls": calls, "own": method.pools.nbytes, "whole": 4 * whole, "moved": method.counters()})
        engine.close()
    return report
