"""HeteroLoRA: a budget of rank, given every so often to the modules that matter most.

Paper: Zhang et al. 2024, Unlocking the Global Synergies in Low-Rank Adapters (HeteroLoRA).
Deviations: from the public implementation, as far as it is known
- Gradients of scores are those of the global batch, summed over ``--hetero-score-batches``; every score is computed
  for shortcuts too. SNIP takes the gradient of the masks, not the masks, and keeps every module's score.
- Ties are drawn by (seed, update), not by the running generator; the scoring pass touches no generator at all.
- ALPHA-TEST's metric is the perplexity of the task's loss, for classification too; the batches are training batches.
- SNIP, SYNFLOW and ALPHA-TEST are refused without a warm-up: while B is 0 they are 0 for every module.
- A module that is switched on again goes on with the momentum it had, as there; its Adam clock stood still meanwhile.
- A shortcut's identity is added, not multiplied. Embeddings, norms and heads are trained, as with every method here.
- Memory is that of all modules; what is off costs neither products nor updates, but its gradients travel as zeros.

At update t with t >= warm-up and (t - warm-up) divisible by the interval: all modules on; a score for each; the best
⌊p·M⌋ of M matrices and round(p·N) of N shortcuts stay on, the others keep weights and moments and do not move. Where
scores say nothing (one is not finite, or B is still 0 where they need it) all stays as it was, and the next attempt
tries again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalowrank.config import at_least, flag
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LogicalMatrix, LowRankFactors
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.allocation import allocate, budgets
from megalowrank.methods.base import Adapters, Context
from megalowrank.methods.importance import SCORES, over_stages, sizes_of_B
from megalowrank.methods.lora import LoRA, LoRAConfig


@dataclass
class HeteroLoRAConfig(LoRAConfig):
    """Which modules get rank, and when that is decided."""

    lora_rank: int = flag(8, "rank r of every adapted matrix")
    lora_alpha: float = flag(16.0, "scale of the low-rank term is alpha / r")
    lora_init: str = flag("classic", "how the factors start", choices=("switchlora", "classic"))
    hetero_interval: int = flag(
        100, "updates between reallocations; 0: none, what --lora-config says stays", unit="updates"
    )
    hetero_warmup_iters: int = flag(0, "updates with every module on before the first reallocation", unit="updates")
    hetero_budget: float = flag(0.25, "share of the modules that are on after a reallocation")
    hetero_score: str = flag("grad-norm", "what modules are ranked by; constant: chance", choices=tuple(SCORES))
    hetero_score_batches: int = flag(1, "global batches that a score is computed from", unit="batches")
    hetero_shortcuts: str = flag(
        "off",
        "low-rank shortcuts round attention and MLP and across blocks: none, ranked apart, or with the matrices",
        choices=("off", "separated", "combined"),
    )

    def check(self) -> None:
        """Ranges, and that a score can tell modules apart."""
        super().check()
        at_least("hetero-interval", self.hetero_interval, 0)
        at_least("hetero-warmup-iters", self.hetero_warmup_iters, 0)
        at_least("hetero-score-batches", self.hetero_score_batches, 1)
        if not 0.0 < self.hetero_budget <= 1.0:
            raise ConfigError("--hetero-budget is out of range", self.hetero_budget, "0 < share <= 1")
        zero = self.lora_init == "classic" or self.hetero_shortcuts != "off"
        if SCORES[self.hetero_score].needs_B and zero and self.hetero_interval and not self.hetero_warmup_iters:
            raise ConfigError(
                f"--hetero-score {self.hetero_score} is 0 for every module (or shortcut) before training, since B is 0",
                "--hetero-warmup-iters 0",
                "a warm-up of at least 1 update, or --hetero-score grad-norm",
            )


class HeteroLoRA(LoRA):
    """LoRA whose modules are switched on and off."""

    name = "heterolora"
    config_class = HeteroLoRAConfig

    def adapters(self) -> Adapters:
        found = super().adapters()
        return Adapters(found.spec, found.patterns, table=found.table, shortcuts=self.config.hetero_shortcuts != "off")

    def warnings(self, matrices: Sequence[LogicalMatrix]) -> list[str]:
        """A budget that leaves nothing on is an error; nothing else to say."""
        shortcuts = sum(is_shortcut(matrix.name) for matrix in matrices)
        if self.config.hetero_interval:
            budgets(len(matrices) - shortcuts, shortcuts, self.config.hetero_budget)
        return []

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LoRA; a shortcut begins with B = 0 whatever matrices begin with, since there is no W to take B A from."""
        return self.drawn(matrix, "classic" if is_shortcut(matrix.name) else self.config.lora_init, dtype, seed)

    def start(self, ctx: Context) -> None:
        """Everything is on."""
        self._ctx, self._off = ctx, dict[str, int]()
        self._events: list[dict[str, Any]] = []
        self._spent_ms, self._due = 0.0, False

    def before_step(self, step: int, ctx: Context) -> None:
        """Reallocate if it is time."""
        config = self.config
        since = step - config.hetero_warmup_iters
        self._due |= bool(config.hetero_interval) and since >= 0 and since % config.hetero_interval == 0
        self.retry(step, ctx)

    def retry(self, step: int, ctx: Context) -> None:
        """Reallocate if the last attempt could not."""
        if self._due:
            began = time.perf_counter()
            self._due = not self._reallocate(step, ctx)
            self._spent_ms += 1000.0 * (time.perf_counter() - began)

    def _reallocate(self, step: int, ctx: Context) -> bool:
        """Whether modules could be chosen."""
        config, event = self.config, {"step": step + 1, "event": "reallocation", "score": self.config.hetero_score}
        shortcut = [is_shortcut(name) for name in ctx.names]
        if SCORES[config.hetero_score].needs_B and _without_B(sizes_of_B(ctx), shortcut):
            self._events.append({**event, "kept": "B is 0: the learning rate was 0 so far"})
            return False
        before = [layer.enabled for layer in ctx.layers]
        for layer in ctx.layers:
            layer.enabled = True
        scores = over_stages(ctx, SCORES[config.hetero_score].of(ctx, ctx.batches(config.hetero_score_batches)))
        if not all(map(math.isfinite, scores)):
            for layer, enabled in zip(ctx.layers, before, strict=True):
                layer.enabled = enabled
            self._events.append({**event, "kept": "a score is not finite"})
            return False
        key = (ctx.seed, "reallocation", step)
        choice = allocate(scores, shortcut, config.hetero_budget, config.hetero_shortcuts, key)
        for layer in ctx.layers:
            layer.enabled = choice.on[layer.index]
        self._hold(ctx, {layer.name: step for layer in ctx.layers if not layer.enabled})
        named = zip(ctx.names, choice.on, scores, strict=True)
        on = {name: score for name, enabled, score in named if enabled}
        off = {name: score for name, score in zip(ctx.names, scores, strict=True) if name not in on}
        found = {"on": on, "off": off, "tied": choice.tied, "margin": choice.margin, "near_tie": choice.near}
        self._events.append({**event, **found})
        return True

    def _hold(self, ctx: Context, off: dict[str, int]) -> None:
        """Hold the modules of ``off``, since the updates it names, and release all others."""
        for j, layer in enumerate(ctx.layers):
            vectors = _vectors(j, layer)
            if layer.name in off and layer.name not in self._off:
                ctx.state.hold(vectors, off[layer.name])
            elif layer.name not in off and layer.name in self._off:
                ctx.state.release(vectors)
        self._off = {name: self._off.get(name, since) for name, since in off.items()}

    def events(self) -> list[dict[str, Any]]:
        found, self._events = self._events, []
        return found

    def counters(self) -> dict[str, float]:
        """How many modules are on, and what reallocations took since the last call."""
        on = torch.tensor([float(sum(layer.enabled for layer in self._ctx.layers))], dtype=torch.float64)
        spent, self._spent_ms = self._spent_ms, 0.0
        return {"modules_on": float(self._ctx.state.sum_over_stages(on)), "reallocation_ms": spent}

    def left_out(self, state: dict[str, Any]) -> frozenset[str]:
        return frozenset(state.get("off", ()))

    def state_dict(self) -> dict[str, Any]:
        return {"off": dict(self._off), "due": self._due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._due = bool(state.get("due"))
        own = {layer.name for layer in self._ctx.layers}
        off = {name: int(since) for name, since in state["off"].items() if name in own}
        for layer in self._ctx.layers:
            layer.enabled = layer.name not in off
        self._hold(self._ctx, off)


def is_shortcut(name: str) -> bool:
    """Whether a module is a shortcut, by its name."""
    return ".shortcut." in name


def _without_B(sizes: Sequence[float], shortcut: Sequence[bool]) -> bool:
    """Whether B of all matrices, or of all shortcuts, is 0."""
    groups = [[size for size, its in zip(sizes, shortcut, strict=True) if its == kind] for kind in set(shortcut)]
    return any(not any(group) for group in groups)


def _vectors(j: int, layer: LowRankFactors) -> VectorSet:
    """All vectors of A and Bᵀ of matrix ``j`` of this stage."""
    return VectorSet.whole([2 * j, 2 * j + 1], [layer.rank] * 2, [layer.columns.padded, layer.rows.padded])
