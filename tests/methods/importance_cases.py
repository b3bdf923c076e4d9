"""Scores of a run divided over ranks: layouts of layout_cases, families LLaMA and OPT."""

from __future__ import annotations

from typing import Any

import torch

from megalowrank.checkpoint.shards import RunTensors
from megalowrank.config import ParallelConfig
from megalowrank.engine.zero import initialize_distributed
from megalowrank.methods.allocation import allocate
from megalowrank.methods.importance import SCORES, over_stages
from megalowrank.parallel.groups import initialize_groups
from tests.engine.layout_cases import Divided, drop_groups
from tests.engine.whole_runs import digest, logical

BATCHES = 2
KEY = ("lots", 5)


def go(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every case its scores and choices, and whether anything was left behind. Collective."""
    initialize_distributed(None)
    initialize_groups(ParallelConfig())
    found = []
    for case in cases:
        found.append(_scores(Divided.start(case), case))
        drop_groups()
    return found


def _scores(run: Divided, case: dict[str, Any]) -> dict[str, Any]:
    run.ctx.micro_batches, run.ctx.ahead = run.shares(0), run.shares
    tensors = RunTensors(run.model, run.engine.state, run.method, run.groups)
    before, random = digest(logical(tensors, run.groups.world)), torch.get_rng_state()
    report: dict[str, Any] = {"scores": {}, "on": {}}
    for name, score in SCORES.items():
        values = over_stages(run.ctx, score.of(run.ctx, run.ctx.batches(BATCHES)))
        report["scores"][name] = dict(zip(run.ctx.names, values, strict=True))
        report["on"][name] = list(allocate(values, [False] * len(values), 0.25, "off", KEY).on)
    report["gradients"] = sum(p.grad is not None and bool(p.grad.any()) for p in run.model.module.parameters())
    report["same"] = before == digest(logical(tensors, run.groups.world))
    report["random"] = bool(torch.equal(random, torch.get_rng_state()))
    report["bits"] = _unsigned_and_back(run)
    if not case["float64"]:
        run.engine.close()
    return report


def _unsigned_and_back(run: Divided) -> list[bool]:
    """Whether weights, with a NaN, an infinity and a negative zero among them, lose their signs and get them back."""
    from megalowrank.engine.zero_state import forward_tensors

    first = forward_tensors(run.model.module)[0].view(-1)
    first[:3] = torch.tensor([-0.0, -torch.inf, -torch.nan])
    bits = [tensor.clone().view(torch.uint8) for tensor in forward_tensors(run.model.module)]
    with run.engine.unsigned():
        inside = not any(bool(tensor.signbit().any()) for tensor in forward_tensors(run.model.module))
    after = [tensor.view(torch.uint8) for tensor in forward_tensors(run.model.module)]
    return [inside, all(torch.equal(a, b) for a, b in zip(bits, after, strict=True))]
