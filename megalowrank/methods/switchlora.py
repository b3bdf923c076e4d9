"""SwitchLoRA: before every step a few vectors of A and B change places with candidates.

Paper: Zhou et al. 2024, SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information (alg. 1 and 2).
Deviations: from the public implementation (asfsdsf/SwitchLoRA)
- A switch happens before the forward pass of a step, not between its backward pass and the optimizer. The function is
  the same, so every gradient is, except those of the frozen counterparts, which no longer weigh in the clipping norm.
- The pool is a FIFO of the C - r spare vectors (C = min(m, n)) and holds masters; correct for every k, also k > C - r.
- Random order draws among the spare vectors only; a vector that just left cannot come back in the same step.
- W is folded with the values that the forward pass sees, so that the function is kept exactly, not to rounding.
- Draws are a pure function of (seed, step, layer); freeze 0 means that states are reset but nothing is frozen.
- The clock of a vector counts executed updates; a skipped step switches nothing and advances nothing.

One step, for each matrix W [m, n], with rate(t) in (0, 1]:
  k = ⌊x⌋ + Bernoulli(x - ⌊x⌋), x = r · rate(t) / interval, at most ⌊r/2⌋ minus what is frozen;
  for the next k positions i of A:  W += s · b_i (a_i - a_i')ᵀ; a_i <- a_i' from the pool, a_i goes into the pool;
  for the next k positions j of B:  W += s · (b_j - b_j') a_jᵀ; likewise;
  the counterparts b_i and a_j lose moments and clock and get no gradient for ``freeze`` steps.
A vector that comes in keeps moments and clock of the one it replaces. Positions of B run ⌊r/2⌋ ahead of those of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megalowrank.config import at_least, flag
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LogicalMatrix
from megalowrank.lowrank.pool import CandidatePools
from megalowrank.methods.base import Context, SavedTensor
from megalowrank.methods.lora import LoRA, LoRAConfig, bounds, draw
from megalowrank.methods.switch_plan import Geometry, SwitchPlan, arcs, make_plan
from megalowrank.parallel.rng import generator, uniform

_BLOCK = 256


@dataclass
class SwitchLoRAConfig(LoRAConfig):
    """How often vectors are switched, and what happens to their counterparts."""

    switch_interval: int = flag(40, "steps after which each vector has been switched once, at the start", unit="steps")
    switch_descent_rate: float = flag(0.1, "share of the run after which switching is down to 30 % (or 50 %: sigmoid)")
    switch_freeze_steps: int = flag(5, "steps for which a counterpart gets no gradient", unit="steps")
    switch_schedule: str = flag("exponential", "how the rate falls", choices=("exponential", "sigmoid", "constant"))
    switch_order: str = flag("fifo", "which candidate comes next", choices=("fifo", "random"))
    offload_candidates: bool = flag(True, "keep candidates in host memory", free=True)

    def check(self) -> None:
        """Ranges, and that a position is not switched again while it is frozen."""
        super().check()
        at_least("switch-interval", self.switch_interval, 1)
        at_least("switch-freeze-steps", self.switch_freeze_steps, 0)
        if not self.switch_descent_rate > 0:
            raise ConfigError("--switch-descent-rate is out of range", self.switch_descent_rate, "> 0")
        if self.switch_schedule == "constant" and self.switch_descent_rate != SwitchLoRAConfig.switch_descent_rate:
            raise ConfigError("--switch-descent-rate has no effect with --switch-schedule constant")
        if self.switch_interval < 2 * self.switch_freeze_steps:
            raise ConfigError(
                "--switch-interval is shorter than twice --switch-freeze-steps",
                f"{self.switch_interval} and {self.switch_freeze_steps}",
                f"an interval of at least {2 * self.switch_freeze_steps}",
            )


def switch_rate(schedule: str, step: np.ndarray, descent_steps: float) -> np.ndarray:
    """Rate of switching at 0-based update ``step``, relative to 1 / interval."""
    if schedule == "constant":
        return np.ones(len(step))
    if schedule == "sigmoid":
        return 1.0 / (1.0 + np.exp(np.minimum(10.0 / descent_steps * (step - descent_steps), 700.0)))
    return np.maximum(0.3 ** ((step + 1) / descent_steps), 1e-8)


class SwitchLoRA(LoRA):
    """LoRA whose vectors are switched with candidates."""

    name = "switchlora"
    config_class = SwitchLoRAConfig

    def warnings(self, matrices: Sequence[LogicalMatrix]) -> list[str]:
        """Matrices that can never switch."""
        stuck = [m.name for m in matrices if m.rank < 2 or m.rank >= min(m.out_features, m.in_features)]
        if not stuck:
            return []
        sample = ", ".join(stuck[:3]) + (", …" if len(stuck) > 3 else "")
        return [
            f"{len(stuck)} of {len(matrices)} matrices can never switch at rank {matrices[0].rank} "
            f"(it must be at least 2 and below both sizes): {sample}"
        ]

    def start(self, ctx: Context) -> None:
        """Draw the candidates and set counters to the start of a run."""
        self.geometry = Geometry.of(ctx.layers)
        matrices = len(ctx.layers)
        self.switched = np.zeros(matrices, dtype=np.int64)
        self.history = np.zeros((max(self.config.switch_freeze_steps, 1), matrices), dtype=np.int64)
        self._planned: tuple[int, SwitchPlan] | None = None
        self._block: tuple[int, np.ndarray] | None = None
        self._moved = 0
        self._layers, self._state = ctx.layers, ctx.state
        self.pools = CandidatePools(
            np.repeat(self.geometry.spare, 2),
            self.geometry.lengths,
            ctx.data_rank,
            ctx.data_size,
            ctx.allocate_host if self.config.offload_candidates else _on(ctx.state.device),
            ctx.state.dtype,
            ctx.state.device,
        )
        for j, layer in enumerate(ctx.layers):
            slots = int(self.geometry.spare[j])
            limits = bounds(self.config.lora_init, layer.rank, layer.out_features, layer.in_features)
            for side in (0, 1):
                length = layer.rows if side else layer.columns
                drawn = draw(limits[side], (slots, length.size), ctx.seed, layer.name, "candidates", side)
                self.pools.fill(2 * j + side, length.take(drawn, 1))

    def before_step(self, step: int, ctx: Context) -> None:
        """Switch, freeze, and start moving the candidates of the next step to the device."""
        planned, self._planned = self._planned, None
        plan = planned[1] if planned is not None and planned[0] == step else self._plan(step, ctx)
        if len(plan.outgoing):
            self._switch(plan, ctx)
        self._advance(plan.counts)
        following = self._plan(step + 1, ctx)
        self.pools.prefetch(following.fetched)
        self._planned = (step + 1, following)

    def _switch(self, plan: SwitchPlan, ctx: Context) -> None:
        fetched = self.pools.take(plan.fetched)
        outgoing, seen, fetched = ctx.state.read(plan.outgoing, plan.touched, fetched)
        incoming = plan.incoming(outgoing, fetched)
        self._fold(plan, seen, incoming.to(ctx.state.forward.dtype).to(seen.dtype))
        ctx.state.write(plan.outgoing, incoming)
        ctx.state.zero(plan.counterparts)
        ctx.state.restart_clock(plan.counterparts)
        self.pools.put(*plan.stored(outgoing))
        self._moved += len(plan.outgoing)

    def _fold(self, plan: SwitchPlan, seen: torch.Tensor, incoming: torch.Tensor) -> None:
        """Take the incoming vectors out of W and put the outgoing ones in, one product per matrix."""
        seen.index_add_(0, plan.changed(seen.device), incoming, alpha=-1)
        for j, v_start, u_start, vectors in plan.blocks:
            layer = self._layers[j]
            v_KN = seen[v_start : v_start + vectors * layer.columns.padded].view(vectors, -1)
            u_KM = seen[u_start : u_start + vectors * layer.rows.padded].view(vectors, -1)
            layer.fold(u_KM, v_KN)

    def _plan(self, step: int, ctx: Context) -> SwitchPlan:
        counts = self._counts(step, ctx)
        order = self._random_slots(step, counts, ctx) if self.config.switch_order == "random" else None
        return make_plan(self.geometry, counts, self.switched, order)

    def _counts(self, step: int, ctx: Context) -> np.ndarray:
        """k of every matrix at ``step``, int64 [matrices]."""
        if self._block is None or self._block[0] != step // _BLOCK:
            self._block = (step // _BLOCK, self._wanted(step - step % _BLOCK, ctx))
        counts = self._block[1][step % _BLOCK]
        frozen = self.history[1:].sum(0) if self.config.switch_freeze_steps else 0
        return np.minimum(counts, self.geometry.limit - frozen)

    def _wanted(self, first: int, ctx: Context) -> np.ndarray:
        """What the schedule asks for in a block of steps, before what is frozen limits it [steps, matrices]."""
        steps = np.arange(first, first + _BLOCK)
        descent = self.config.switch_descent_rate * ctx.train_iters
        rate = switch_rate(self.config.switch_schedule, steps, descent)
        expected = self.geometry.ranks / (self.config.switch_interval / rate[:, None])
        whole = np.floor(expected)
        wanted = (whole + (self.draws(steps, ctx) < expected - whole)).astype(np.int64)
        return np.where(self.geometry.spare > 0, wanted, 0)

    def draws(self, steps: np.ndarray, ctx: Context) -> np.ndarray:
        """The uniform draw of every matrix at ``steps`` [steps, matrices]: the only randomness of the schedule."""
        return uniform(ctx.seed, "switch", steps, np.array([layer.index for layer in ctx.layers]))

    def _random_slots(self, step: int, counts: np.ndarray, ctx: Context) -> list[np.ndarray]:
        """For each matrix a random order of as many distinct slots as it needs."""
        found = []
        for layer, count, spare in zip(ctx.layers, counts, self.geometry.spare, strict=True):
            if not count:
                found.append(np.zeros(0, dtype=np.int64))
                continue
            source = generator(ctx.seed, "slots", step, layer.index)
            found.append(torch.randperm(int(spare), generator=source)[: min(count, spare)].numpy())
        return found

    def _advance(self, counts: np.ndarray) -> None:
        """Move the pointers and close the gates of the counterparts."""
        self.switched += counts
        self.history[:-1] = self.history[1:]
        self.history[-1] = counts
        if not self.config.switch_freeze_steps:
            return
        frozen, ranks = self.history.sum(0), self.geometry.ranks
        stop = self.switched % ranks
        ahead = (self.switched + ranks // 2) % ranks
        rows = zip(self._layers, frozen.tolist(), stop.tolist(), ahead.tolist(), strict=True)
        for layer, count, stop_A, stop_B in rows:
            layer.gate_Bt.frozen = arcs(stop_A, count, layer.rank)
            layer.gate_A.frozen = arcs(stop_B, count, layer.rank)

    def counters(self) -> dict[str, float]:
        moved, self._moved = self._moved, 0
        return {"switched_vectors": int(self._state.sum_over_stages(torch.tensor([moved])))}

    def planned_reads(self, rank: int, out_features: int, in_features: int) -> tuple[float, float, float]:
        """A vector that is switched, its candidate, and both factors' vectors for the fold."""
        spare = min(out_features, in_features) > rank
        count = min(rank / self.config.switch_interval, rank // 2) if spare else 0.0
        return count, 2 * count, count

    def candidates(self) -> str:
        return "host" if self.config.offload_candidates else "device"

    def memory(self) -> dict[str, int]:
        return {f"candidates ({self.candidates()})": self.pools.nbytes}

    def state_dict(self) -> dict[str, Any]:
        switched = {layer.name: count for layer, count in zip(self._layers, self.switched.tolist(), strict=True)}
        history = {layer.name: self.history[:, j].tolist() for j, layer in enumerate(self._layers)}
        return {"switched": switched, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [layer.name for layer in self._layers]
        lost = [name for name in names if len(state["history"].get(name, ())) != len(self.history)]
        if lost:
            raise ConfigError(
                "the checkpoint was made with another --switch-freeze-steps or other adapted matrices",
                f"{lost[0]}: {len(state['history'].get(lost[0], ()))} steps of history",
                len(self.history),
            )
        history = np.array([state["history"][name] for name in names], dtype=np.int64).reshape(len(names), -1).T
        self._planned = None
        counts = history[-1].copy()
        self.switched[:] = np.array([state["switched"][name] for name in names], dtype=np.int64) - counts
        self.history[1:] = history[:-1]
        self._advance(counts)

    def saved_tensors(self) -> list[SavedTensor]:
        found = []
        for j, layer in enumerate(self._layers):
            slots = int(self.geometry.spare[j])
            for side, factor, length in ((2 * j, "A", layer.columns), (2 * j + 1, "B", layer.rows)):
                if slots:
                    shape, rows = (slots, length.size), self.pools.local(side)
                    name, first, step = f"{layer.name}.{factor}", self.pools.rank, self.pools.world
                    found.append(SavedTensor(name, shape, first, step, length, rows))
        return found


def _on(device: torch.device) -> Any:
    return lambda numel, dtype: torch.empty(numel, dtype=dtype, device=device)
