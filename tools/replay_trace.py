"""Replay a SwitchLoRA trace of the reference implementation through the production code.

    python tools/replay_trace.py FILE.npz [--zero 0..3] [--ranks 1..4]

The trace brings initial weights, pools, gradients and uniform draws of some matrices (suffix _j); method,
layer, optimizer, DeepSpeed engine and state view are those of a training run. The last line of output is
JSON: the largest deviation of each tensor relative to its largest element, and whether clocks, slots,
frozen vectors and numbers of switches are exactly those of the trace. Exit code 1 above 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from megalowrank.config import ParallelConfig
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.errors import ConfigError, run_main
from megalowrank.lowrank.factors import LowRankFactors, LowRankSpec
from megalowrank.lowrank.linear import LowRankColumnParallelLinear
from megalowrank.methods.base import Context
from megalowrank.methods.switch_plan import SwitchPlan, arcs
from megalowrank.methods.switchlora import SwitchLoRA, SwitchLoRAConfig
from megalowrank.parallel.collectives import sum_over
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.launch import set_rank_environment

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


class TraceLinear(LowRankColumnParallelLinear):
    """The production layer, with a forward pass whose gradients are those of the trace."""

    def __init__(self, trace: Trace, matrix: int) -> None:
        weight = trace.tensor("W0", matrix)
        config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
        spec, blocks = LowRankSpec(trace.rank, 1.0 / trace.rank), (("m", weight.shape[0]),)
        super().__init__(
            weight.shape[1], weight.shape[0], config=config, init_method=lambda w: None, bias=False,
            blocks=blocks, lowrank=spec,
        )  # fmt: skip
        self.matrix, self.trace = matrix, trace
        with torch.no_grad():
            self.weight.copy_(weight)
            self.factors[0].A.copy_(trace.tensor("A0", matrix))
            self.factors[0].Bt.copy_(trace.tensor("B0", matrix, transpose=True))

    def forward(self, step: int) -> torch.Tensor:  # type: ignore[override]
        """A scalar whose gradient is that of the trace at ``step``."""
        grad_A = torch.from_numpy(self.trace.data[f"gA_{self.matrix}"][step])
        grad_B = torch.from_numpy(self.trace.data[f"gB_{self.matrix}"][step]).t()
        return (self.factors[0].A * grad_A).sum() + (self.factors[0].Bt * grad_B).sum()


class TraceModel(torch.nn.Module):
    """All matrices of a trace; the input is the step."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        linears = [TraceLinear(trace, matrix) for matrix in trace.matrices]
        self.linears = torch.nn.ModuleList(linears)
        self.factors = [linear.factors[0] for linear in linears]

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        """Sum over matrices."""
        return torch.stack([linear(int(step)) for linear in self.linears]).sum()


class TracedSwitchLoRA(SwitchLoRA):
    """The production method with recorded draws, which labels every vector with its slot in the reference."""

    def begin(self, trace: Trace, layers: list[LowRankFactors]) -> None:
        """Take over pools and labels; called after ``start``."""
        self.trace, self.labels = trace, {}
        self.counted: list[np.ndarray] = []
        for j, (layer, matrix) in enumerate(zip(layers, trace.matrices, strict=True)):
            spare, rank = min(layer.out_features, layer.in_features) - layer.rank, layer.rank
            for side, name in enumerate(("poolA0", "poolB0")):
                position = (np.arange(rank) - side * (rank // 2)) % rank
                self.labels[2 * j + side] = (spare + position, np.arange(max(spare, 0)))
                if spare > 0:
                    self.pools.fill(2 * j + side, trace.tensor(name, matrix)[:spare])

    def draws(self, steps: np.ndarray, ctx: Context) -> np.ndarray:
        return self.trace.data["draws"][np.minimum(steps, self.trace.steps - 1)][:, self.trace.matrices]

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
        self.exact = dict.fromkeys(("clock", "slots", "frozen", "k"), True)

    def close(self, kind: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Record how far ``got`` is from ``expected``, relative to the largest element."""
        scale = float(expected.abs().max()) or 1.0
        difference = float((got - expected).abs().max()) / scale
        self.relative[kind] = max(self.relative[kind], difference if difference == difference else float("inf"))

    def same(self, kind: str, got: Any, expected: Any) -> None:
        """Record whether two arrays are equal."""
        self.exact[kind] = self.exact[kind] and bool(np.array_equal(np.ravel(got), np.ravel(expected)))

    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return all(value <= TOLERANCE for value in self.relative.values()) and all(self.exact.values())


def replay(trace: Trace, stage: int) -> Comparison:
    """Run the trace on this job's ranks; every rank gets the same comparison."""
    groups = initialize_groups(ParallelConfig())
    model = TraceModel(trace)
    layers = model.factors
    for j, layer in enumerate(layers):
        layer.name, layer.index = f"matrix.{trace.matrices[j]}", j
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
    engine = ZeroEngine(model, layers, optimizer, settings, groups)
    method = TracedSwitchLoRA(config)
    ctx = Context(layers, engine.state, 0, trace.steps, groups.data_rank, groups.data_size, host_allocator(False))
    method.start(ctx)
    method.begin(trace, layers)
    found = Comparison()
    for step in range(trace.steps):
        method.before_step(step, ctx)
        engine.train_step([torch.tensor(step)], trace.lr)
        if step in trace.times:
            snapshot(found, trace, step, method, engine, layers)
    found.same("k", np.array(method.counted), trace.data["k"][:, trace.matrices])
    return found


def snapshot(
    found: Comparison,
    trace: Trace,
    step: int,
    method: TracedSwitchLoRA,
    engine: ZeroEngine,
    layers: list[LowRankFactors],
) -> None:
    """Compare everything at one step."""
    clocks = engine.state.clocks
    for j, (layer, matrix) in enumerate(zip(layers, trace.matrices, strict=True)):
        found.close(
            "W", whole_weight(layer, engine).view(layer.out_features, -1), trace.tensor(f"W_{matrix}", f"t{step}")
        )
        for side, (name, parameter, gate) in enumerate((("A", layer.A, layer.gate_A), ("B", layer.Bt, layer.gate_Bt))):
            for kind, prefix, attribute in ((name, "", "master"), ("m", "m", "exp_avg"), ("v", "v", "exp_avg_sq")):
                expected = trace.tensor(f"{prefix}{name}_{matrix}", f"t{step}", transpose=side == 1)
                found.close(kind, whole(engine, parameter, attribute, expected.shape), expected)
            births = clocks.births[clocks.first[2 * j + side] :][: layer.rank]
            found.same("clock", engine.state.updates - births, trace.data[f"t{name}_{matrix}_t{step}"])
            found.same("slots", method.labels[2 * j + side][0], trace.data[f"sel{name}_{matrix}_t{step}"])
            left = method.remaining(j, side, layer.rank)
            found.same("frozen", left, trace.data[f"fix{name}_{matrix}_t{step}"])
            closed = {row for first, last in gate.frozen for row in range(first, last)}
            found.exact["frozen"] &= set(np.flatnonzero(left).tolist()) <= closed


def whole(engine: ZeroEngine, parameter: torch.nn.Parameter, attribute: str, shape: torch.Size) -> torch.Tensor:
    """A master or moment assembled over ranks."""
    flat = torch.zeros(shape.numel())
    for partition in engine.state.partitions:
        for fragment in partition.fragments:
            if fragment.parameter is parameter:
                stored = getattr(partition, attribute)[fragment.offset : fragment.offset + fragment.numel]
                flat[fragment.start : fragment.start + fragment.numel] = stored
    return (sum_over(flat, engine.group) if engine.state.masters_sharded else flat).view(shape)


def whole_weight(layer: LowRankFactors, engine: ZeroEngine) -> torch.Tensor:
    """W assembled over ranks, 1-D."""
    piece, value = layer.weight.locate(), layer.weight.value()
    if value.numel() == layer.weight.out_features * layer.weight.in_features:
        return value
    flat = torch.zeros(layer.weight.out_features * layer.weight.in_features)
    flat[piece.start : piece.start + value.numel()] = value
    return sum_over(flat, engine.group)


def main() -> None:
    """Parse, start the ranks if there are several, replay, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", type=Path, help="trace, .npz")
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="ZeRO stage")
    parser.add_argument("--ranks", type=int, default=1, choices=range(1, 5), help="data-parallel ranks")
    args = parser.parse_args()
    trace = Trace(args.file)
    if args.ranks > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        env = dict(os.environ, OMP_NUM_THREADS="1", LOCAL_SIZE=str(args.ranks))
        sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=env).returncode)
    rank, _, _ = set_rank_environment()
    initialize_distributed(timedelta(minutes=5))
    found = replay(trace, args.zero)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps({"max_rel": found.relative, "exact": found.exact}), flush=True)
    sys.exit(0 if found.passed() else 1)


if __name__ == "__main__":
    run_main(main)
