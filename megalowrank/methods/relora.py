"""ReLoRA: every so often the low-rank update is merged into W, and the factors start anew.

Paper: Lialin et al. 2023, ReLoRA: High-Rank Training Through Low-Rank Updates (alg. 1, section 3).
Deviations: from the public implementation (Guitaricet/relora)
- The merge after update u is the merge before update u + 1; a run that is resumed between the two merges too.
- The factors are drawn at the start (``--lora-init classic``). The reference starts with A = B = 0, in which nothing
  learns until the first merge; ``--lora-init zero`` is that start.
- Moments are zeroed exactly (``--relora-reset zero``); the reference keeps one element in a thousand.
- One mask prunes both moments of an element; the reference's two masks, which keep exp_avg where exp_avg_sq is gone and
  so make steps of any size, are ``--relora-masks independent``.
- ``--lr-restart-offset`` shifts merges, resets and the schedule alike (the reference shifts only the schedule, and its
  guard not at all, so that the first restart has no warm-up).
- Masters are merged, not their bfloat16 copies. No dropout, no trainable scale, no quantised W.
- Draws and random masks are a pure function of (seed, step, tensor, element).

At update index t, with (t + offset - 1) divisible by R and t + offset > R, for each matrix W [m, n]:
  W += s · B A;  A ~ U(-1/√n, 1/√n);  B = 0;  the moments of A and B are pruned, their clock goes on.
An interval of merges equal to that of ``--lr-decay-style cosine_restarts`` merges right after the one update whose
learning rate is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalowrank.config import at_least, flag
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LogicalMatrix, LowRankFactors
from megalowrank.lowrank.prune import Pruning, prune
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.base import Context
from megalowrank.methods.lora import LoRA, LoRAConfig

_NONE = VectorSet.whole([], [], [])


@dataclass
class ReLoRAConfig(LoRAConfig):
    """When factors are merged, and what becomes of their moments."""

    lora_alpha: float = flag(32.0, "scale of the low-rank term is alpha / r")
    lora_init: str = flag(
        "classic",
        "how the factors start; zero: A = B = 0, nothing learns until the first merge",
        choices=("classic", "switchlora", "zero"),
    )
    relora_interval: int = flag(1000, "updates between merges", unit="updates")
    relora_reset: str = flag(
        "zero", "what a merge does to the factors' moments", choices=("zero", "random", "magnitude", "none")
    )
    relora_prune_ratio: float | None = flag(
        None, "share of the moments that random or magnitude pruning zeroes; default: 0.9"
    )
    relora_masks: str = flag(
        "shared", "one mask for exp_avg and exp_avg_sq, or one of its own for each", choices=("shared", "independent")
    )
    relora_restart_clock: bool = flag(False, "restart Adam's bias correction of the factors at a merge")

    def check(self) -> None:
        """Ranges of single values."""
        super().check()
        at_least("relora-interval", self.relora_interval, 1)
        prunes = self.relora_reset in ("random", "magnitude")
        if self.relora_prune_ratio is not None and not prunes:
            raise ConfigError(f"--relora-prune-ratio has no effect with --relora-reset {self.relora_reset}")
        if self.relora_masks == "independent" and not prunes:
            raise ConfigError(f"--relora-masks independent has no effect with --relora-reset {self.relora_reset}")
        if self.relora_prune_ratio is not None and not 0.0 < self.relora_prune_ratio < 1.0:
            raise ConfigError("--relora-prune-ratio is out of range", self.relora_prune_ratio, "0 < ratio < 1")


class ReLoRA(LoRA):
    """LoRA that merges and restarts."""

    name = "relora"
    config_class = ReLoRAConfig

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LoRA; the zero start leaves both factors at 0."""
        if self.config.lora_init != "zero":
            return super().initial_factors(matrix, seed, dtype)
        return torch.zeros(matrix.rank, matrix.in_features), torch.zeros(matrix.rank, matrix.out_features)

    def warnings(self, matrices: Sequence[LogicalMatrix]) -> list[str]:
        """What the zero start means."""
        if self.config.lora_init != "zero":
            return []
        return [
            "with --lora-init zero both factors are 0: nothing low-rank learns until the first merge "
            f"after {self.config.relora_interval} updates"
        ]

    def start(self, ctx: Context) -> None:
        """Nothing is kept between merges but numbers for the log."""
        self._merges = 0
        self._zeros: dict[str, float] = {}

    def restart_interval(self) -> int:
        """The learning rate restarts with the merges."""
        return self.config.relora_interval

    def due(self, step: int, offset: int) -> bool:
        """Whether a merge comes before update ``step``."""
        shifted = step + offset
        return shifted > self.config.relora_interval and (shifted - 1) % self.config.relora_interval == 0

    def before_step(self, step: int, ctx: Context) -> None:
        """Merge, draw anew and prune if it is time."""
        if not self.due(step, ctx.restart_offset):
            return
        for j, layer in enumerate(ctx.layers):
            lengths = [layer.columns.padded, layer.rows.padded]
            vectors = VectorSet.whole([2 * j, 2 * j + 1], [layer.rank] * 2, lengths)
            self._merge(layer, vectors, step, ctx)
            if self.config.relora_restart_clock:
                ctx.state.restart_clock(vectors)
        self._merges += 1
        if self.config.relora_reset != "none":
            self._zeros = prune(ctx.state, self._rule(), ctx.seed, step)

    def _merge(self, layer: LowRankFactors, vectors: VectorSet, step: int, ctx: Context) -> None:
        masters, _, _ = ctx.state.read(vectors, _NONE, torch.empty(0, dtype=ctx.state.dtype, device=ctx.state.device))
        A, Bt = masters.split((layer.rank * layer.columns.padded, layer.rank * layer.rows.padded))
        layer.fold(Bt.view(layer.rank, -1), A.view(layer.rank, -1))
        drawn = layer.own(*self.redraw(layer, step, ctx))
        new_A, new_Bt = (factor.to(ctx.state.device, ctx.state.dtype) for factor in drawn)
        if new_Bt.any():
            layer.fold(-new_Bt, new_A)
        ctx.state.write(vectors, torch.cat((new_A.flatten(), new_Bt.flatten())))

    def redraw(self, matrix: LogicalMatrix, step: int, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and Bᵀ [r, out] of the whole matrix after the merge before ``step``, as the forward pass rounds."""
        init = "classic" if self.config.lora_init == "zero" else self.config.lora_init
        return self.drawn(matrix, init, ctx.state.forward.dtype, ctx.seed, step)

    def _rule(self) -> Pruning:
        how = self.config.relora_reset
        share = 1.0 if how == "zero" else self.config.relora_prune_ratio or 0.9
        return Pruning(how, share, self.config.relora_masks == "shared")

    def planned_reads(self, rank: int, out_features: int, in_features: int) -> tuple[float, float, float]:
        """All vectors once an interval."""
        return rank / self.config.relora_interval, 0.0, 0.0

    def counters(self) -> dict[str, float]:
        merges, self._merges = self._merges, 0
        return {"merges": merges, **{f"zeroed_{name}": share for name, share in self._zeros.items()}}
