"""Replay a SwitchLoRA trace of the reference implementation through the production code.

    python tools/replay_trace.py FILE.npz [--zero 0..3] [--ranks 1..4] [--tp 1..4]

The trace brings initial weights, pools, gradients and uniform draws of some matrices (suffix _j); method,
layers, optimizer, DeepSpeed engine and state view are those of a training run. Every matrix is replayed twice,
as a column- and as a row-parallel layer, divided over --tp ranks in each of --ranks replicas. The last line of
output is JSON: the largest deviation of each tensor relative to its largest element, and whether clocks, slots,
frozen vectors and numbers of switches are exactly those of the trace, and padding exactly zero. Exit code 1
above 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from megalowrank.config import ParallelConfig
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.errors import ConfigError, run_main
from megalowrank.lowrank.factors import LowRankFactors, LowRankSpec
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.methods.base import Context
from megalowrank.methods.switch_plan import SwitchPlan, arcs
from megalowrank.methods.switchlora import SwitchLoRA, SwitchLoRAConfig
from megalowrank.parallel.collectives import max_over, sum_over
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.launch import set_rank_environment
from megalowrank.parallel.partition import Share, share
from megalowrank.parallel.wire import Wire, partial_parameters

TOLERANCE = 1e-5


class Trace:
    """A trace file: ``matrices`` are the suffixes in it, ``times`` the steps with snapshots."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as data:
                self.data = {key: data[key] for key in data.files}
            rank, interval, freeze, descent, steps, self.lr = self.data["meta"].tolist()
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigError(
                f"{path} is not a SwitchLoRA trace", type(error).__name__, "a .npz file with 'meta'"
            ) from None
        self.rank, self.interval, self.freeze = int(rank), int(interval), int(freeze)
        self.descent, self.steps = descent, int(steps)
        self.matrices = sorted(int(m.group(1)) for key in self.data if (m := re.fullmatch(r"W0_(\d+)", key)))
        self.times = sorted({int(m.group(1)) for key in self.data if (m := re.fullmatch(r"W_\d+_t(\d+)", key))})

    def tensor(self, name: str, matrix: int | str, transpose: bool = False) -> torch.Tensor:
        """Entry ``name``_``matrix`` as float32, transposed if it is stored by columns."""
        value = torch.from_numpy(self.data[f"{name}_{matrix}"]).float()
        return value.t().contiguous() if transpose else value


class TraceLinear(torch.nn.Module):
    """What a production layer becomes whose gradients are those of a matrix of the trace, whatever it computes."""

    weight: torch.nn.Parameter
    factors: list[LowRankFactors]
    wire: Wire

    def take_over(self, trace: Trace, matrix: int) -> None:
        """Set this rank's part of W and of the factors."""
        self.trace, self.matrix, layer = trace, matrix, self.factors[0]
        self.partial = {id(parameter) for parameter in partial_parameters(self)}
        A, Bt = layer.own(trace.tensor("A0", matrix), trace.tensor("B0", matrix, transpose=True))
        with torch.no_grad():
            self.weight.copy_(layer.columns.take(layer.rows.take(trace.tensor("W0", matrix), 0), 1))
            layer.A.copy_(A)
            layer.Bt.copy_(Bt)

    def forward(self, step: int) -> torch.Tensor:
        """A scalar whose gradient is this rank's part of that of the trace at ``step``."""
        grad_A, grad_B = (torch.from_numpy(self.trace.data[f"g{name}_{self.matrix}"][step]) for name in "AB")
        layer = self.factors[0]
        own = zip((layer.A, layer.Bt), layer.own(grad_A, grad_B.t()), strict=True)
        return torch.stack([(factor * self._term(factor, gradient)).sum() for factor, gradient in own]).sum()

    def _term(self, factor: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the gradient of ``factor``: all of it, or a part that ranks have to sum up."""
        if id(factor) not in self.partial:
            return gradient
        part, term = share(gradient.shape[1], self.wire.rank, self.wire.size), torch.zeros_like(gradient)
        term[:, part.start : part.stop] = gradient[:, part.start : part.stop]
        return term


class TraceColumn(TraceLinear, LowRankColumnParallelLinear):  # type: ignore[misc]
    """The column-parallel layer."""


class TraceRow(TraceLinear, LowRankRowParallelLinear):  # type: ignore[misc]
    """The row-parallel layer."""


def trace_linear(trace: Trace, kind: str, matrix: int, wire: Wire) -> TraceLinear:
    """This rank's part of a matrix of the trace."""
    rows, columns = trace.data[f"W0_{matrix}"].shape
    flags: dict[str, Any] = {
        "config": ModelParallelConfig(
            tensor_model_parallel_size=wire.size, use_cpu_initialization=True, perform_initialization=False
        ),
        "init_method": lambda weight: None, "bias": False, "skip_bias_add": False, "blocks": (("m", rows),),
        "columns": columns, "lowrank": LowRankSpec(trace.rank, 1.0 / trace.rank), "wire": wire,
    }  # fmt: skip
    padded_rows, padded_columns = (share(size, 0, wire.size).padded * wire.size for size in (rows, columns))
    linear: TraceLinear
    if kind == "column":
        linear = TraceColumn(columns, padded_rows, **flags)
    else:
        linear = TraceRow(padded_columns, rows, input_is_parallel=True, **flags)
    linear.take_over(trace, matrix)
    return linear


class TraceModel(torch.nn.Module):
    """All matrices of a trace, one after the other as a layer of every kind; the input is the step."""

    def __init__(self, trace: Trace, kinds: Sequence[str], wire: Wire) -> None:
        super().__init__()
        made = [(kind, matrix) for matrix in trace.matrices for kind in kinds]
        linears = [trace_linear(trace, kind, matrix, wire) for kind, matrix in made]
        self.linears = torch.nn.ModuleList(linears)
        self.factors, self.matrices = [linear.factors[0] for linear in linears], [matrix for _, matrix in made]
        for index, (layer, (kind, matrix)) in enumerate(zip(self.factors, made, strict=True)):
            layer.name, layer.index = f"{kind}.{matrix}", index

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        """Sum over layers."""
        return torch.stack([linear(int(step)) for linear in self.linears]).sum()


class TracedSwitchLoRA(SwitchLoRA):
    """The production method with recorded draws, which labels every vector with its slot in the reference."""

    def begin(self, trace: Trace, model: TraceModel) -> None:
        """Take over pools and labels; called after ``start``."""
        self.trace, self.matrices, self.labels = trace, model.matrices, {}
        self.counted: list[np.ndarray] = []
        for j, (layer, matrix) in enumerate(zip(model.factors, model.matrices, strict=True)):
            spare, rank = min(layer.out_features, layer.in_features) - layer.rank, layer.rank
            for side, name in enumerate(("poolA0", "poolB0")):
                position = (np.arange(rank) - side * (rank // 2)) % rank
                self.labels[2 * j + side] = (spare + position, np.arange(max(spare, 0)))
                if spare > 0:
                    length = layer.rows if side else layer.columns
                    self.pools.fill(2 * j + side, length.take(trace.tensor(name, matrix)[:spare], 1))

    def draws(self, steps: np.ndarray, ctx: Context) -> np.ndarray:
        return self.trace.data["draws"][np.minimum(steps, self.trace.steps - 1)][:, self.matrices]

    def _switch(self, plan: SwitchPlan, ctx: Context) -> None:
        super()._switch(plan, ctx)
        for factor, row, slot in zip(plan.outgoing.factors, plan.outgoing.rows, plan.slots.rows, strict=True):
            active, queue = self.labels[int(factor)]
            active[row], queue[slot] = queue[slot], active[row]

    def _advance(self, counts: np.ndarray) -> None:
        super()._advance(counts)
        self.counted.append(counts.copy())

    def remaining(self, j: int, side: int, rank: int) -> np.ndarray:
        """Frozen steps left after this one, for every row of A (side 0) or Bᵀ (side 1)."""
        left = np.zeros(rank, dtype=np.int64)
        stop = int(self.switched[j] + (rank // 2 if side == 0 else 0))
        for age, count in enumerate(self.history[::-1, j].tolist()):
            for first, last in arcs(stop % rank, count, rank):
                left[first:last] = self.trace.freeze - 1 - age
            stop -= count
        return left


class Comparison:
    """Deviations collected over all snapshots."""

    def __init__(self) -> None:
        self.relative = dict.fromkeys(("W", "A", "B", "m", "v"), 0.0)
        self.exact = dict.fromkeys(("clock", "slots", "frozen", "k", "padding"), True)

    def close(self, kind: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Record how far ``got`` is from ``expected``, relative to the largest element."""
        scale = float(expected.abs().max()) or 1.0
        difference = float((got - expected).abs().max()) / scale
        self.relative[kind] = max(self.relative[kind], difference if difference == difference else float("inf"))

    def same(self, kind: str, got: Any, expected: Any) -> None:
        """Record whether two arrays are equal."""
        self.exact[kind] = self.exact[kind] and bool(np.array_equal(np.ravel(got), np.ravel(expected)))

    def over_ranks(self) -> None:
        """Take the worst of all ranks; every rank calls it."""
        wrong = [float(not exact) for exact in self.exact.values()]
        worst = max_over(torch.tensor([*self.relative.values(), *wrong], dtype=torch.float64), dist.group.WORLD)
        values = iter(worst.tolist())
        self.relative = {kind: next(values) for kind in self.relative}
        self.exact = {kind: next(values) == 0 for kind in self.exact}

    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return all(value <= TOLERANCE for value in self.relative.values()) and all(self.exact.values())


def replay(trace: Trace, stage: int, kinds: Sequence[str], parallel: ParallelConfig) -> Comparison:
    """Run the trace on this job's ranks; every rank gets the same comparison."""
    groups = initialize_groups(parallel)
    model = TraceModel(trace, kinds, groups.wire().schedule(parallel.lowrank_schedule != "partial"))
    config = SwitchLoRAConfig(
        lora_rank=trace.rank, switch_interval=trace.interval, switch_freeze_steps=trace.freeze,
        switch_descent_rate=trace.descent / trace.steps,
    )  # fmt: skip
    optimizer = VectorClockAdamW([p for p in model.parameters() if p.requires_grad], lr=trace.lr)
    settings = {
        "train_batch_size": groups.data_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine = ZeroEngine(model, model.factors, optimizer, settings, groups)
    method = TracedSwitchLoRA(config)
    ctx = Context(
        model.factors, engine.state, 0, trace.steps, groups.data_rank, groups.data_size, host_allocator(False)
    )
    method.start(ctx)
    method.begin(trace, model)
    found = Comparison()
    for step in range(trace.steps):
        method.before_step(step, ctx)
        engine.train_step([torch.tensor(step)], trace.lr)
        if step in trace.times:
            snapshot(found, trace, step, method, engine, model)
    found.same("k", np.array(method.counted), trace.data["k"][:, model.matrices])
    found.over_ranks()
    return found


def snapshot(
    found: Comparison, trace: Trace, step: int, method: TracedSwitchLoRA, engine: ZeroEngine, model: TraceModel
) -> None:
    """Compare everything at one step."""
    clocks = engine.state.clocks
    for j, (layer, matrix) in enumerate(zip(model.factors, model.matrices, strict=True)):
        weight = stripped(found, whole_weight(layer, engine), (layer.rows, layer.columns), engine.groups)
        found.close("W", weight, trace.tensor(f"W_{matrix}", f"t{step}"))
        sides = (("A", layer.A, layer.gate_A, layer.columns), ("B", layer.Bt, layer.gate_Bt, layer.rows))
        for side, (name, parameter, gate, length) in enumerate(sides):
            for kind, prefix, attribute in ((name, "", "master"), ("m", "m", "exp_avg"), ("v", "v", "exp_avg_sq")):
                expected = trace.tensor(f"{prefix}{name}_{matrix}", f"t{step}", transpose=side == 1)
                own = whole(engine, parameter, attribute, layer.rank * length.padded)
                found.close(kind, stripped(found, own, (share(layer.rank), length), engine.groups), expected)
            births = clocks.births[clocks.first[2 * j + side] :][: layer.rank]
            found.same("clock", engine.state.updates - births, trace.data[f"t{name}_{matrix}_t{step}"])
            found.same("slots", method.labels[2 * j + side][0], trace.data[f"sel{name}_{matrix}_t{step}"])
            left = method.remaining(j, side, layer.rank)
            found.same("frozen", left, trace.data[f"fix{name}_{matrix}_t{step}"])
            closed = {row for first, last in gate.frozen for row in range(first, last)}
            found.exact["frozen"] &= set(np.flatnonzero(left).tolist()) <= closed


def stripped(found: Comparison, own: torch.Tensor, shares: tuple[Share, Share], groups: Groups) -> torch.Tensor:
    """The whole of a tensor of which ``own``, 1-D and padded, is this rank's part.

    What every tensor-parallel rank holds whole stays this rank's, so that each compares its own.
    """
    block = own.view([part.padded for part in shares])
    real = block[tuple(slice(part.real) for part in shares)]
    found.exact["padding"] &= int(block.count_nonzero()) == int(real.count_nonzero())
    if all(part.padded == part.size for part in shares):
        return real
    result = torch.zeros([part.size for part in shares])
    result[tuple(slice(part.start, part.stop) for part in shares)] = real
    return sum_over(result, groups.tensor)


def whole(engine: ZeroEngine, parameter: torch.nn.Parameter, attribute: str, numel: int) -> torch.Tensor:
    """A master or moment of this tensor-parallel rank, assembled over its replicas, 1-D."""
    flat = torch.zeros(numel)
    for partition in engine.state.partitions:
        for fragment in partition.fragments:
            if fragment.parameter is parameter:
                stored = getattr(partition, attribute)[fragment.offset : fragment.offset + fragment.numel]
                flat[fragment.start : fragment.start + fragment.numel] = stored
    return sum_over(flat, engine.group) if engine.state.masters_sharded else flat


def whole_weight(layer: LowRankFactors, engine: ZeroEngine) -> torch.Tensor:
    """W of this tensor-parallel rank, assembled over its replicas, 1-D."""
    piece, value = layer.weight.locate(), layer.weight.value()
    if value.numel() == layer.weight.out_features * layer.weight.in_features:
        return value
    flat = torch.zeros(layer.weight.out_features * layer.weight.in_features)
    flat[piece.start : piece.start + value.numel()] = value
    return sum_over(flat, engine.group)


def arguments() -> argparse.Namespace:
    """The command line; ConfigError for a schedule without anything to schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", type=Path, help="trace, .npz")
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="ZeRO stage")
    parser.add_argument("--ranks", type=int, default=1, choices=range(1, 5), help="data-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, choices=range(1, 5), help="tensor-parallel ranks of each of them")
    parser.add_argument("--split", default="both", choices=("column", "row", "both"), help="kinds of layer")
    parser.add_argument(
        "--lowrank-schedule", default="ride", choices=("ride", "partial"),
        help="partial: gradients of factors that all ranks hold arrive as partial sums",
    )  # fmt: skip
    args = parser.parse_args()
    if args.lowrank_schedule == "partial" and args.tp == 1:
        raise ConfigError("--lowrank-schedule partial has no effect with --tp 1")
    return args


def main() -> None:
    """Parse, start the ranks if there are several, replay, print."""
    args = arguments()
    trace, world = Trace(args.file), args.ranks * args.tp
    if world > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        env = dict(os.environ, OMP_NUM_THREADS="1", LOCAL_SIZE=str(world))
        sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=env).returncode)
    rank, _, _ = set_rank_environment()
    initialize_distributed(timedelta(minutes=5))
    parallel = ParallelConfig(tensor_model_parallel_size=args.tp, lowrank_schedule=args.lowrank_schedule)
    found = replay(trace, args.zero, ("column", "row") if args.split == "both" else (args.split,), parallel)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"max_rel": found.relative, "exact": found.exact}), flush=True)
    sys.exit(0 if found.passed() else 1)


if __name__ == "__main__":
    run_main(main)
