"""LTE: heads of low-rank factors train apart on a shared frozen weight, which takes the mean of what they learned.

Paper: Huh et al. 2024, Training Neural Networks from Scratch with Parallel Low-Rank Adapters (alg. 1).
Deviations: from the public implementation (minyoungg/LTE)
- A head is a group of ranks with its own share of every batch; no gradient crosses heads. The reference keeps all
  heads on every rank and averages all gradients there, which comes to the same with Adam's epsilon / H.
- The merge after update t - 1 is the merge before update t; a run that is resumed between the two merges too.
- An evaluation sees W with the mean of what heads have learned since the merge, folded in for its duration; the
  reference evaluates W alone. A checkpoint holds heads and W as they are, so that it resumes in the middle of an
  interval; what reads weights from it adds the mean.
- What the forward pass sees of factors is merged and kept as snapshots, their bfloat16 copies where there are some.
- No biases of factors; clipping, weight decay and skipped updates are each head's own.

For head h of H, with W [m, n], s = alpha / r, A_h [r, n], B_h [m, r] and snapshots A'_h, B'_h:
  y = W x + s (B_h A_h - B'_h A'_h) x;  A_h starts with orthonormal rows times √(n / r), B_h, A'_h and B'_h with 0
  before update t > 0 with t divisible by the interval: W += 1/H Σ_h s (B_h A_h - B'_h A'_h);  A' = A;  B' = B
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megalowrank.config import ParallelConfig, TrainConfig, above, at_least, flag
from megalowrank.errors import ConfigError, TrainingError
from megalowrank.lowrank.factors import LogicalMatrix, LowRankFactors, LowRankSpec, folded_weights
from megalowrank.lowrank.rank_table import rank_table, table_text
from megalowrank.lowrank.subspace import stiefel
from megalowrank.lowrank.vectors import VectorSet
from megalowrank.methods.base import Adapters, Context, Method
from megalowrank.methods.lte_merge import Pair, blocks, fold_mean, merge_bytes, vectors_of

_NONE = VectorSet.whole([], [], [])


@dataclass
class LTEConfig:
    """Heads, and when they are merged."""

    lora_rank: int = flag(32, "rank r of every adapted matrix in every head")
    lora_alpha: float = flag(16.0, "scale of the low-rank term is alpha / r")
    lora_target: list | None = flag(
        None, "matrices to adapt: names or shell patterns; default: every linear of the blocks", nargs="+"
    )
    lora_config: str | None = flag(
        None, "TOML file with rank, alpha and on/off of single matrices, or its text; default: all alike"
    )
    lte_heads: int = flag(1, "groups of ranks that train apart between merges", unit="heads", free=True)
    lte_merge_interval: int = flag(10, "updates between merges", unit="updates")
    lte_plain: str = flag(
        "frozen",
        "parameters without factors: not trained, averaged over heads at merges, or trained alike with one gradient",
        choices=("frozen", "averaged", "synchronous"),
    )
    lte_heads_per_rank: int = flag(
        1, "heads that share a rank, each with its part of every micro-batch; for study, it saves nothing", unit="heads"
    )
    lte_reset: bool = flag(False, "after a merge draw factors anew and forget their moments, instead of keeping both")

    def check(self) -> None:
        """Ranges of single values; of a file of ranks the text is kept, so that run.json has it."""
        self.lora_config = table_text(self.lora_config)
        if self.lora_config is not None and self.lte_heads_per_rank > 1:
            raise ConfigError("--lora-config does not go with --lte-heads-per-rank", self.lte_heads_per_rank, 1)
        at_least("lora-rank", self.lora_rank, 1)
        above("lora-alpha", self.lora_alpha, 0.0)
        at_least("lte-heads", self.lte_heads, 1)
        at_least("lte-heads-per-rank", self.lte_heads_per_rank, 1)
        at_least("lte-merge-interval", self.lte_merge_interval, 1)


class LTE(Method):
    """Factors that train apart and are merged."""

    name = "lte"
    config_class = LTEConfig

    def replica_groups(self) -> int:
        return self.config.lte_heads

    def check_run(self, micro_batch_size: int, train: TrainConfig, parallel: ParallelConfig) -> None:
        """What heads that share a rank, or train something alike, cannot do."""
        if self.config.lte_plain == "synchronous" and self.config.lte_heads > 1 and train.clip_grad > 0:
            raise ConfigError(
                "--lte-plain synchronous cannot clip: every head has its own norm, so that they would drift apart",
                train.clip_grad,
                "--clip-grad 0",
            )
        count = self.config.lte_heads_per_rank
        if count == 1:
            return
        if self.config.lte_plain == "averaged":
            raise ConfigError(
                "--lte-heads-per-rank has one copy of parameters without factors, and nothing to average",
                "--lte-plain averaged",
                "frozen, synchronous",
            )
        if parallel.tensor_model_parallel_size > 1:
            raise ConfigError(
                "--lte-heads-per-rank is for study, without tensor parallelism",
                f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
                "1, or --lte-heads",
            )
        if train.clip_grad > 0:
            raise ConfigError(
                "--lte-heads-per-rank cannot clip: the norm would be that of several heads",
                train.clip_grad,
                "--clip-grad 0",
            )
        if micro_batch_size % count:
            raise ConfigError(
                "--lte-heads-per-rank must divide the micro-batch", f"{count} and {micro_batch_size} samples"
            )

    def warnings(self, matrices: Sequence[LogicalMatrix]) -> list[str]:
        """What frozen parameters mean."""
        if self.config.lte_plain != "frozen":
            return []
        return [
            "with --lte-plain frozen embeddings, norms and head stay as they start; averaged or synchronous trains them"
        ]

    def adapters(self) -> Adapters:
        rank = self.config.lora_rank
        count = self.config.lte_heads_per_rank
        spec = LowRankSpec(count * rank, self.config.lora_alpha / rank, snapshot=True, chunks=count)
        plain = self.config.lte_plain
        targets, table = tuple(self.config.lora_target or ("*",)), rank_table(self.config.lora_config)
        return Adapters(spec, targets, frozen=plain == "frozen", shared=plain == "synchronous", table=table)

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drawn(matrix, seed, dtype)

    def drawn(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype, *key: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and Bᵀ = 0 of the heads of this rank, rounded to ``dtype``; ``key`` tells draws apart."""
        count = self.config.lte_heads_per_rank
        rank = matrix.rank // count
        heads = range(count * self.head, count * self.head + count)
        drawn = [stiefel(rank, matrix.in_features, seed, matrix.name, "A", head, *key) for head in heads]
        A = torch.cat(drawn) * math.sqrt(matrix.in_features / rank)
        return A.to(dtype), torch.zeros(count * rank, matrix.out_features, dtype=dtype)

    def start(self, ctx: Context) -> None:
        """Nothing is kept between merges but numbers for the log."""
        self._merges, self._received = 0, 0
        self._kept: list[tuple[torch.Tensor, ...]] = []

    def before_step(self, step: int, ctx: Context) -> None:
        """Merge if it is time."""
        if step == 0 or step % self.config.lte_merge_interval:
            return
        before = 0 if ctx.heads is None else ctx.heads.received
        for first, layers in blocks(ctx.layers):
            self._merge(first, layers, ctx, f"the merge before update {step + 1}")
            if self.config.lte_reset:
                self._reset(first, layers, ctx, step)
            else:
                self._remember(first, layers, ctx)
        self._average(ctx, f"the merge before update {step + 1}")
        self._merges += 1
        self._received += 0 if ctx.heads is None else ctx.heads.received - before

    def _merge(self, first: int, layers: Sequence[LowRankFactors], ctx: Context, what: str) -> None:
        """W of some matrices, of which ``first`` is the number of the first, takes the mean of all heads."""
        (packed,) = self._factors(first, layers, ctx)
        sizes = [layer.rank * length.padded for layer in layers for length in (layer.columns, layer.rows)]
        now = packed.split(sizes)
        before = [] if self.config.lte_reset else list(self._snapshots(layers, ctx))
        pairs: list[Pair] = []
        for i, layer in enumerate(layers):
            A, Bt = (values.view(layer.rank, -1) for values in now[2 * i : 2 * i + 2])
            if not self.config.lte_reset:
                old_A, old_Bt = (values.view(layer.rank, -1) for values in before[2 * i : 2 * i + 2])
                A, Bt = torch.cat((A, old_A)), torch.cat((Bt, -old_Bt))
            pairs.append((A, Bt))
        fold_mean(layers, pairs, ctx, self.config.lte_heads_per_rank, what)

    def _factors(self, first: int, layers: Sequence[LowRankFactors], ctx: Context) -> tuple[torch.Tensor]:
        """A and Bᵀ of this head, matrix by matrix, as the forward pass sees them."""
        empty = torch.empty(0, dtype=ctx.state.dtype, device=ctx.state.device)
        return (ctx.state.read(_NONE, vectors_of(first, layers), empty)[1],)

    def _snapshots(self, layers: Sequence[LowRankFactors], ctx: Context) -> Iterator[torch.Tensor]:
        for layer in layers:
            for fixed in layer.fixed:
                yield ctx.state.read_fixed(fixed).flatten()

    def _remember(self, first: int, layers: Sequence[LowRankFactors], ctx: Context) -> None:
        """Snapshots are the factors: W alone is the function now."""
        (packed,) = self._factors(first, layers, ctx)
        fixed = [factor for layer in layers for factor in layer.fixed]
        sizes = [factor.rank * factor.length.padded for factor in fixed]
        for factor, values in zip(fixed, packed.split(sizes), strict=True):
            ctx.state.write_fixed(factor, values)

    def _reset(self, first: int, layers: Sequence[LowRankFactors], ctx: Context, step: int) -> None:
        """New A, B = 0, no moments, a new clock; snapshots are 0 and stay so."""
        vectors, dtype = vectors_of(first, layers), ctx.state.forward.dtype
        drawn = [layer.own(*self.drawn(layer, ctx.seed, dtype, step)) for layer in layers]
        values = torch.cat([factor.flatten() for pair in drawn for factor in pair])
        ctx.state.write(vectors, values.to(ctx.state.device, ctx.state.dtype))
        ctx.state.zero(vectors)
        ctx.state.restart_clock(vectors)

    def after_attempt(self, applied: bool, ctx: Context) -> None:
        """What heads train alike they must skip alike."""
        if ctx.heads is None or self.config.lte_plain != "synchronous":
            return
        found = ctx.heads.numbers(float(applied), "an update")
        if len(set(found)) > 1:
            skipped = " and ".join(str(head) for head, done in enumerate(found) if not done)
            raise TrainingError(
                f"head {skipped} alone skipped an update, which --lte-plain synchronous cannot go on from"
            )

    def _average(self, ctx: Context, what: str) -> None:
        """Masters of parameters without factors take their mean over heads; moments stay."""
        if ctx.heads is None or ctx.engine is None or self.config.lte_plain != "averaged":
            return
        masters = ctx.state.others()
        if masters:
            mean = ctx.heads.mean_in_order(torch.cat([master.to(ctx.state.device) for master in masters]), what)
            for master, values in zip(masters, mean.split([master.numel() for master in masters]), strict=True):
                master.copy_(values)
        ctx.engine.reload()

    def settle(self, ctx: Context) -> None:
        """Fold in the mean of what heads have learned since the merge; what there was is kept on the host."""
        for weight in folded_weights(ctx.layers):
            stored = [weight.locate().flat] + ([] if weight.residual is None else [weight.residual])
            self._kept.append(tuple(tensor.to("cpu", copy=True) for tensor in stored))
        self._kept.append(tuple(values.cpu() for values in self._snapshots(ctx.layers, ctx)))
        masters = ctx.state.others() if self.config.lte_plain == "averaged" else []
        self._kept.append(tuple(master.to("cpu", copy=True) for master in masters))
        for first, layers in blocks(ctx.layers):
            self._merge(first, layers, ctx, "an evaluation")
            self._remember(first, layers, ctx)
        self._average(ctx, "an evaluation")

    def unsettle(self, ctx: Context) -> None:
        """Take it back, bit by bit."""
        *weights, snapshots, others = self._kept
        self._kept = []
        for weight, kept in zip(folded_weights(ctx.layers), weights, strict=True):
            piece = weight.locate()
            piece.flat.copy_(kept[0])
            if weight.residual is not None:
                weight.residual.copy_(kept[1])
            piece.update_mirror()
        fixed = [factor for layer in ctx.layers for factor in layer.fixed]
        for factor, values in zip(fixed, snapshots, strict=True):
            ctx.state.write_fixed(factor, values)
        if ctx.heads is not None and ctx.engine is not None and self.config.lte_plain == "averaged":
            for master, values in zip(ctx.state.others(), others, strict=True):
                master.copy_(values)
            ctx.engine.reload()

    def planned_reads(self, rank: int, out_features: int, in_features: int) -> tuple[float, float, float]:
        """Forward copies of all vectors, once an interval."""
        return 0.0, rank / self.config.lte_merge_interval, 0.0

    def between_heads(self, rank: int, rows: int, columns: int, itemsize: int) -> float:
        """The cheaper way to merge, once an interval."""
        vectors = rank * (1 if self.config.lte_reset else 2)
        return (
            min(merge_bytes(vectors, rows, columns, self.config.lte_heads, itemsize)) / self.config.lte_merge_interval
        )

    def counters(self) -> dict[str, float]:
        """Merges, and the bytes that this rank received from other heads for them."""
        found = {"merges": float(self._merges), "merge_bytes": float(self._received)}
        self._merges, self._received = 0, 0
        return found
