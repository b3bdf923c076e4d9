"""GoLore: W learns in a low-dimensional subspace of its gradient, which is changed every so often.

Paper: He et al. 2024, Subspace Optimization for Large Language Models with Convergence Guarantees (alg. 1, GoLore);
the subspace by SVD is that of GaLore (Zhao et al. 2024).
Deviations: from the public implementation (pkumelon/Golore), in its low-memory form
- A refresh comes before the forward pass; its gradient is that of a probe pass over the very batch of the update,
  which then trains with the new projector: the same gradient as projecting afterwards, but its norm is clipped as any
  other update's, not by the norm of the full gradient.
- Momentum is rotated for good (the reference's optimizer form forgets the rotated one after a single update), and
  whatever the optimizer is called; exp_avg_sq is kept, as there.
- A random projector is drawn by QR of a Gaussian with R's diagonal positive: the same law as Z (ZᵀZ)^(-1/2), from
  (seed, step, matrix) instead of every rank's generator.
- The subspace is that of the logical gradient, averaged over data-parallel ranks and micro-batches; left or right is
  decided by the logical shape.
- Where the gradient of a refresh is not finite the projector stays; where its SVD fails it is found by iteration.
- Weight decay acts on the trained factor, and Adam's epsilon is epsilon / s of the projected gradient, as there.
- y = W x + s·B A x; the reference subtracts, and both signs cancel.

At update t with t divisible by the gap T, for each W [m, n] with gradient G, P new orthonormal rows, s the scale:
  W += s · B A;  m >= n: A = P [r, n], of the row space of G, B is trained; m < n: Bᵀ = P [r, m], A is trained;
  exp_avg <- (P P_oldᵀ) exp_avg in the trained factor's vectors; the trained factor is 0.
P are the leading singular vectors of G while t < rand_ratio · iterations, else uniform on the Stiefel manifold.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megalowrank.config import above, at_least, flag
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LogicalMatrix, LowRankFactors, LowRankSpec, folded_weights, projects_rows
from megalowrank.lowrank.rank_table import rank_table, table_text
from megalowrank.lowrank.subspace import stiefel
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.base import Adapters, Context, Method, RefreshPlan

_NONE = VectorSet.whole([], [], [])


@dataclass
class GoLoreConfig:
    """The subspace, and when it changes."""

    lora_rank: int = flag(128, "rank r of the subspace of every adapted matrix")
    proj_scale: float = flag(1.0, "scale of the low-rank term")
    lora_target: list | None = flag(
        None, "matrices to adapt: names or shell patterns; default: every linear of the blocks", nargs="+"
    )
    lora_config: str | None = flag(
        None, "TOML file with rank, alpha and on/off of single matrices, or its text; default: all alike"
    )
    update_proj_gap: int = flag(200, "updates between changes of the subspace", unit="updates")
    projector: str = flag(
        "svd",
        "how the subspace is found: exactly, by a randomized range finder (much faster on an accelerator), or drawn",
        choices=("svd", "randomized", "random"),
    )
    rand_ratio: float = flag(0.8, "share of the run after which subspaces are drawn at random; 1: never")
    proj_momentum: str = flag(
        "rotate", "momentum when the subspace changes: expressed in the new one, or kept as it is",
        choices=("rotate", "keep"),
    )  # fmt: skip
    probe_passes: int = flag(
        1,
        "extra passes over the batch of a refresh; with more, fewer gradients are held at once and it takes longer",
        unit="passes",
        free=True,
    )

    def check(self) -> None:
        """Ranges of single values; of a file of ranks the text is kept, so that run.json has it."""
        self.lora_config = table_text(self.lora_config)
        table = rank_table(self.lora_config)
        if table is not None and table.has_alpha:
            raise ConfigError("--lora-config has an alpha, which a projector has not", None, "rank and enabled")
        at_least("lora-rank", self.lora_rank, 1)
        above("proj-scale", self.proj_scale, 0.0)
        at_least("update-proj-gap", self.update_proj_gap, 1)
        at_least("probe-passes", self.probe_passes, 1)
        if not 0.0 <= self.rand_ratio <= 1.0:
            raise ConfigError("--rand-ratio is out of range", self.rand_ratio, "0 <= ratio <= 1")


class GoLore(Method):
    """Projected gradients as a frozen W with one fixed and one trained factor."""

    name = "golore"
    config_class = GoLoreConfig

    def adapters(self) -> Adapters:
        spec = LowRankSpec(self.config.lora_rank, self.config.proj_scale, projector=True)
        return Adapters(spec, tuple(self.config.lora_target or ("*",)), table=rank_table(self.config.lora_config))

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random projector, which the first update replaces, and 0."""
        sizes = matrix.in_features, matrix.out_features
        right = projects_rows(matrix.out_features, matrix.in_features)
        projector = stiefel(matrix.rank, sizes[not right], seed, "projector", matrix.name).to(dtype)
        zero = torch.zeros(matrix.rank, sizes[right], dtype=dtype)
        return (projector, zero) if right else (zero, projector)

    def start(self, ctx: Context) -> None:
        """Nothing is kept between refreshes but numbers for the log."""
        self._numbers: dict[str, float] = {}
        self._missing: list[LowRankFactors] = []

    def before_step(self, step: int, ctx: Context) -> None:
        """Change the subspaces if it is time."""
        if step % self.config.update_proj_gap == 0:
            self._missing = list(ctx.layers)
            self._refresh(step, ctx)

    def retry(self, step: int, ctx: Context) -> None:
        """Change those whose gradient was not finite in the attempt before."""
        if step % self.config.update_proj_gap == 0:
            self._refresh(step, ctx)

    def _refresh(self, step: int, ctx: Context) -> None:
        began = time.perf_counter()
        self._numbers = {"refreshes": 1.0, "svd_failures": 0.0, "projectors_kept": 0.0, "refresh_bytes": 0.0}
        number = {layer.name: j for j, layer in enumerate(ctx.layers)}
        for layer, rows in self.projectors(step, ctx):
            self._turn(number[layer.name], layer, rows, ctx)
            self._missing.remove(layer)
        counted = torch.tensor([self._numbers["svd_failures"], self._numbers["projectors_kept"]])
        self._numbers["svd_failures"], self._numbers["projectors_kept"] = ctx.state.sum_over_stages(counted).tolist()
        self._numbers["refresh_ms"] = 1000.0 * (time.perf_counter() - began)

    def projectors(self, step: int, ctx: Context) -> Iterator[tuple[LowRankFactors, torch.Tensor]]:
        """The new projectors [r, length] of matrices of this stage that lack theirs, found with what is there now."""
        late = self.config.rand_ratio < 1.0 and step >= self.config.rand_ratio * ctx.train_iters
        if not late and self.config.projector != "random":
            yield from self._leading(step, ctx)
            return
        search = ctx.state.subspace_search(self._missing, False, (ctx.seed, "projector", step))
        search.draw()
        yield from search.results()

    def _leading(self, step: int, ctx: Context) -> Iterator[tuple[LowRankFactors, torch.Tensor]]:
        """Probe in as many groups as there are passes; of the gradients of a group only the subspaces are left."""
        weights, passes, missing = folded_weights(ctx.layers), self.config.probe_passes, list(self._missing)
        for i in range(passes):
            group = weights[len(weights) * i // passes : len(weights) * (i + 1) // passes]
            layers = [layer for layer in missing if layer.weight in group]
            search = ctx.state.subspace_search(layers, self.config.projector == "randomized", (ctx.seed, step))
            peak = ctx.probe(search.weights, search.take)
            yield from search.results()
            self._numbers["svd_failures"] += search.failed
            self._numbers["projectors_kept"] += search.unfit
            self._numbers["refresh_bytes"] = max(self._numbers["refresh_bytes"], peak + search.peak)

    def _turn(self, j: int, layer: LowRankFactors, rows: torch.Tensor, ctx: Context) -> None:
        """Fold the trained factor of matrix ``j`` into W and begin anew with the projector ``rows`` [r, length]."""
        state, fixed = ctx.state, layer.fixed[0]
        right = fixed.name == "A"
        own = layer.rows if right else layer.columns
        vectors = VectorSet.whole([2 * j + right], [layer.rank], [own.padded])
        packed, _, _ = state.read(vectors, _NONE, torch.empty(0, dtype=state.dtype, device=state.device))
        trained, old = packed.view(layer.rank, -1), state.read_fixed(fixed)
        layer.fold(*((trained, old) if right else (old, trained)))
        new = fixed.length.take(rows, 1).to(state.device, state.forward.dtype)
        state.write_fixed(fixed, new)
        state.write(vectors, torch.zeros_like(packed))
        if self.config.proj_momentum == "rotate":
            state.rotate(2 * j + right, state.sum_of_parts(new.to(state.dtype) @ old.t(), fixed.length))

    def refresh_plan(self) -> RefreshPlan | None:
        """Searches; random subspaces cost next to nothing."""
        if self.config.projector == "random" or self.config.rand_ratio == 0.0:
            return None
        rotates = self.config.proj_momentum == "rotate"
        return RefreshPlan(self.config.update_proj_gap, self.config.probe_passes, rotates)

    def counters(self) -> dict[str, float]:
        """Numbers of the last refresh, if there was one."""
        numbers, self._numbers = self._numbers, {}
        return numbers
