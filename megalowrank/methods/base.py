"""The seam: what a method is, and everything it may touch.

A method is a policy that acts between optimizer steps. It owns no layer, no optimizer and no training
loop; it reaches the model and the sharded state only through the verbs of its ``Context``.

Life of a run: ``adapters`` says what to build; ``initial_factors`` gives the factors of a matrix, whole and
float, before they are divided over ranks; ``start`` runs once on the engine's state; then
``before_step(t)`` once for every update index t, before its first forward pass. t counts committed
updates: after a skipped update the same t is not announced again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from megalowrank.config import ParallelConfig, TrainConfig
from megalowrank.lowrank.factors import LogicalMatrix, LowRankFactors, LowRankSpec
from megalowrank.lowrank.fold import Probed
from megalowrank.lowrank.pool import HostAllocator
from megalowrank.lowrank.probe import Take
from megalowrank.lowrank.rank_table import RankTable
from megalowrank.lowrank.state import OptimizerStateView
from megalowrank.parallel.heads import Heads
from megalowrank.parallel.partition import Share


class ContextEngine(Protocol):
    """What a context asks of an engine."""

    def reload(self) -> None:
        """Bring forward copies in line with masters that were written."""

    def probe(self, micro_batches: Sequence[torch.Tensor], weights: Sequence[Probed], take: Take) -> int:
        """The gradients of ``weights``."""

    def eval_step(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean loss on this rank."""

    def end_evaluation(self) -> None:
        """No more evaluation follows."""

    def unsigned(self) -> AbstractContextManager[None]:
        """While entered, weights are their absolute values and word embeddings are ones."""


@dataclass
class Context:
    """Everything a method may touch. ``layers`` are this stage's, in the order of their global index.

    ``names``: those of the matrices and shortcuts of the whole model by global index. ``restart_offset``: updates by
    which restarts of the schedule, and of the method, come earlier. ``micro_batches`` are those of the coming update on
    this rank, ``ahead(k)`` those of the k-th after it. ``heads``: the other groups of ranks, if the method asked for
    several. ``beat`` is told of long work between updates, for a watchdog.
    """

    layers: Sequence[LowRankFactors]
    state: OptimizerStateView
    seed: int
    train_iters: int
    data_rank: int
    data_size: int
    allocate_host: HostAllocator
    restart_offset: int = 0
    engine: ContextEngine | None = None
    micro_batches: Sequence[torch.Tensor] = ()
    heads: Heads | None = None
    names: Sequence[str] = ()
    ahead: Callable[[int], Sequence[torch.Tensor]] | None = None
    beat: Callable[[str], None] = lambda where: None

    def __post_init__(self) -> None:
        """Without names the layers here are all there are."""
        if not self.names:
            self.names = tuple(layer.name for layer in self.layers)

    def batches(self, count: int) -> list[Sequence[torch.Tensor]]:
        """The micro-batches on this rank of the next ``count`` updates; nothing is consumed."""
        if count > 1 and self.ahead is None:
            raise RuntimeError("this context has no batches to look ahead to")
        return [self.micro_batches, *(self.ahead(k) for k in range(1, count) if self.ahead is not None)]

    def loss(self, batches: Sequence[Sequence[torch.Tensor]]) -> float:
        """Mean loss over batches of all data-parallel ranks, without gradients. Every rank of the job calls it."""
        if self.engine is None:
            raise RuntimeError("this context has no engine to evaluate")
        self.beat("an evaluation between updates")
        total = torch.stack([self.engine.eval_step(batch) for batch in batches]).double().mean()
        self.engine.end_evaluation()
        return float(self.state.mean_over_data_ranks(total))

    def probe(self, weights: Sequence[Probed], take: Take, micro_batches: Sequence[torch.Tensor] | None = None) -> int:
        """Full gradients of the coming update, as if its batch were trained on with what is there now.

        Every rank calls it alike. Leaves no trace; ``take(i, gradient)`` gets that of ``weights[i]``, this rank's part
        [out, in], the mean over the micro-batches of this rank (or over ``micro_batches``, if they are given). Returns
        the bytes of gradients held at the peak.
        """
        if self.engine is None:
            raise RuntimeError("this context has no engine to probe")
        self.beat("a probe pass")
        return self.engine.probe(self.micro_batches if micro_batches is None else micro_batches, weights, take)


@dataclass(frozen=True)
class RefreshPlan:
    """A search for subspaces every ``interval`` updates, in ``passes`` probe passes; ``rotates`` momentum with them."""

    interval: int
    passes: int
    rotates: bool


@dataclass(frozen=True)
class Adapters:
    """What a method wants built: the rank and scale of the linears that ``patterns`` name.

    ``table`` says otherwise of single matrices. ``frozen``: what is neither a factor nor under one is not trained
    either; ``shared``: it is trained alike by all heads. ``shortcuts``: also low-rank connections round the blocks.
    """

    spec: LowRankSpec
    patterns: tuple[str, ...]
    frozen: bool = False
    shared: bool = False
    table: RankTable | None = None
    shortcuts: bool = False

    def spec_of(self, name: str) -> LowRankSpec | None:
        """What the factors of the matrix called ``name`` are; None: it is frozen and has none."""
        return self.spec if self.table is None else self.table.spec_of(name, self.spec)

    def check_names(self, names: Sequence[str], adapted: Sequence[str]) -> None:
        """Raise ConfigError unless every entry of the table is one of the ``names`` of the model, and has an effect:
        one that is on is about a matrix that is ``adapted``."""
        if self.table is not None:
            self.table.check(names, adapted)


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a method for the checkpoint: rows first, first + step, … of a logical [rows, length].

    ``columns`` says which elements of every row this rank has, in front of padding.
    """

    name: str
    shape: tuple[int, int]
    first: int
    step: int
    columns: Share
    rows: torch.Tensor


class Method:
    """Base of all methods: trains whatever requires a gradient and does nothing between steps.

    ``head`` is the group of ranks that this rank belongs to, of ``replica_groups``; it is set before anything is built.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    head: int = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    def adapters(self) -> Adapters | None:
        """What to build into the linears; None leaves them plain and trainable."""
        return None

    def check_run(self, micro_batch_size: int, train: TrainConfig, parallel: ParallelConfig) -> None:
        """Raise ConfigError for a run that the method cannot do; ``micro_batch_size`` in samples."""

    def replica_groups(self) -> int:
        """Groups of ranks that train apart, each with its own factors and optimizer state; they divide the job."""
        return 1

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and Bᵀ [r, out] of a whole logical matrix at the start; s·B·A is taken out of W.

        Every rank that holds a part of the matrix asks alike and keeps its part. ``dtype`` is the precision of the
        forward pass, to which both are rounded.
        """
        raise NotImplementedError(f"{self.name} builds no factors")

    def warnings(self, matrices: Sequence[LogicalMatrix]) -> list[str]:
        """What the user should know about the adapted matrices of the model."""
        return []

    def start(self, ctx: Context) -> None:
        """Called once when the engine's state exists, before step 0 or before ``load_state_dict``."""

    def before_step(self, step: int, ctx: Context) -> None:
        """Called before the first forward pass of update ``step`` (0-based, committed updates)."""

    def retry(self, step: int, ctx: Context) -> None:
        """Called before another attempt at update ``step``, for what ``before_step`` could not do with a bad batch."""

    def after_attempt(self, applied: bool, ctx: Context) -> None:
        """Called after every attempt at an update, whether it was ``applied`` or skipped."""

    def settle(self, ctx: Context) -> None:
        """Bring W to what an evaluation must see; ``unsettle`` follows it. Every rank of the job calls both."""

    def unsettle(self, ctx: Context) -> None:
        """Take back what ``settle`` did, so that evaluations leave no trace."""

    def lr_scale(self, step: int) -> float:
        """Factor on the learning rate of update ``step``."""
        return 1.0

    def restart_interval(self) -> int | None:
        """Updates between restarts of the method, with which the learning rate may restart; None: it has none."""
        return None

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call, for ``metrics.jsonl``: JSON objects with an int ``step``, the update."""
        return []

    def counters(self) -> dict[str, float]:
        """The method's own numbers for a log line since the last call; every rank calls it.

        They are those of the whole model, but for names that end in ``_ms`` or ``_bytes``, which are this rank's.
        """
        return {}

    def candidates(self) -> str | None:
        """Where spare vectors are kept: host, device, or None if the method has none."""
        return None

    def refresh_plan(self) -> RefreshPlan | None:
        """When subspaces change, for planning; None if there are none."""
        return None

    def planned_reads(self, rank: int, out_features: int, in_features: int) -> tuple[float, float, float]:
        """Vectors of A, and as many of Bᵀ, that an update reads of a matrix of these sizes, for planning.

        On average over the start of a run: of masters, of forward copies, and of what data-parallel ranks keep for one
        another.
        """
        return 0.0, 0.0, 0.0

    def between_heads(self, rank: int, rows: int, columns: int, itemsize: int) -> float:
        """Bytes that cross to a rank from other heads for a matrix of which it has this part, per update on average.

        ``itemsize`` is that of the forward pass.
        """
        return 0.0

    def memory(self) -> dict[str, int]:
        """Bytes on this rank by category, beside weights and optimizer state."""
        return {}

    def left_out(self, state: dict[str, Any]) -> frozenset[str]:
        """Names of matrices whose factors a run that saved ``state`` does not compute with at that update."""
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """State as JSON values, alike on all ranks of a stage; stages may differ in the keys of mappings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, with the keys of all stages."""

    def saved_tensors(self) -> list[SavedTensor]:
        """Sharded state; the tensors are views, so that a load writes through them."""
        return []
