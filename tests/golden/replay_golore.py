"""Recorded runs of GoLore and GaLore: their projectors, and the conventions of the reference's optimizer.

The reference divides by √v + ε before the bias correction, where ours has ε after it; its decay comes after the step,
not before, and on all of W in GaLore's optimizer form; it clips by the norm of the full gradient where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from megalowrank.engine.engine import Engine
from megalowrank.engine.optimizer import VectorClockAdamW, norm_of_all
from megalowrank.lowrank.factors import LowRankFactors, folded_weights
from megalowrank.methods.base import Context
from megalowrank.methods.golore import GoLore
from megalowrank.models.build import BuiltModel

BETAS = (0.9, 0.999)


def settings(cfg: dict[str, Any]) -> dict[str, Any]:
    """Flags of a run."""
    return {
        "lora_rank": cfg["r"], "proj_scale": cfg["scale"], "update_proj_gap": cfg["gap"],
        "rand_ratio": min(cfg["rand_ratio"], 1.0),
    }  # fmt: skip


def inject(method: GoLore, projectors: Mapping[str, np.ndarray], named: Callable[[str], str]) -> None:
    """Have the method use recorded projectors, by ``P<step>/<name>``: [r, in], or [out, r] on the left."""

    def recorded(step: int, ctx: Context) -> Iterator[tuple[LowRankFactors, torch.Tensor]]:
        for layer in ctx.layers:
            rows = torch.from_numpy(projectors[f"P{step}/{named(layer.name)}"]).double()
            yield layer, rows if layer.fixed[0].name == "A" else rows.t()

    method.projectors = recorded  # type: ignore[method-assign]


def optimizer_of(cfg: dict[str, Any], model: BuiltModel) -> VectorClockAdamW:
    """Factors in a group of their own, whose gradient is s times that of GaLore's optimizer; decay comes later."""
    factors = [p for layer in model.layers for p in (layer.A, layer.Bt) if p.requires_grad]
    known = {id(p) for p in factors}
    others = [p for p in model.module.parameters() if p.requires_grad and id(p) not in known]
    scale = cfg["scale"] if cfg["kind"] == "galore" else 1.0
    groups = [{"params": factors, "gradient_scale": scale}, {"params": others, "gradient_scale": 1.0}]
    return VectorClockAdamW(groups, betas=BETAS, eps=1e-6)


class Conventions:
    """What the reference's optimizer does differently, around the updates of an engine."""

    def __init__(self, cfg: dict[str, Any], model: BuiltModel, engine: Engine) -> None:
        self.cfg, self.model, self.engine = cfg, model, engine

    def before(self, update: int, ctx: Context) -> None:
        """Set ε of this update, and the norm that its gradient is clipped by."""
        correction = (1.0 - BETAS[1] ** (update + 1)) ** 0.5
        for group in self.engine.optimizer.param_groups:
            group["eps"] = 1e-6 * group["gradient_scale"] / correction
        refreshes = update % self.cfg["gap"] == 0
        if self.cfg["clip"] and (refreshes or self.cfg["kind"] == "galore"):
            self.engine.optimizer.norm_over = self._full_norm(ctx)
        else:
            self.engine.optimizer.norm_over = norm_of_all

    def _full_norm(self, ctx: Context) -> Any:
        """The norm with the full gradients of all W in place of the factors'."""
        squares = [torch.zeros((), dtype=torch.float64)]
        ctx.probe(folded_weights(self.model.layers), lambda _, gradient: squares.append(gradient.square().sum()))
        factors = {id(p) for layer in self.model.layers for p in (layer.A, layer.Bt)}

        def norm(owners: list[torch.nn.Parameter]) -> torch.Tensor:
            rest = [p.grad.square().sum() for p in owners if id(p) not in factors and p.grad is not None]
            return torch.stack(squares + rest).sum().sqrt()

        return norm

    def after(self, lr: float) -> None:
        """Decay what has been updated; GaLore's optimizer also has W."""
        kept = 1.0 - lr * self.cfg["wd"]
        if kept == 1.0:
            return
        for partition in self.engine.state.partitions:
            partition.master.mul_(kept)
        for folded in folded_weights(self.model.layers) if self.cfg["kind"] == "galore" else ():
            folded.parameter.data.mul_(kept)
