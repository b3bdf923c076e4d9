"""Collectives of a transformer block's linears under tensor parallelism: calls and bytes per step, layer and direction.

    python benchmarks/bench_collectives.py --tensor-model-parallel-size 2 --sequence-parallel --hidden-size 256

Starts its own ranks (gloo) and counts what torch dispatches, for four variants of each linear, W frozen in all:

    base     without factors
    ride     the rank-r product shares the buffer of the base layer's collective
    partial  the product with the replicated factor is repeated, its gradient is reduced once per step
    naive    an adapter of tensor-parallel linears beside the base layer: of a column-parallel one A is split by rank
             and its output gathered; of a row-parallel one B is split by rows and its output gathered

The logical matrices of a fused projection share the naive adapter's collectives, which flatters it. The gradients that
are left partial are one all-reduce per linear here, where a run may take all of a model together. Bytes are those of
the whole tensor of a call; "sent" is what each rank sends with ring algorithms.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from megalowrank.errors import ConfigError, run_main
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.parallel.launch import set_rank_environment
from megalowrank.parallel.mappings import gather_rows, reduce_output, reduce_rows
from megalowrank.parallel.partition import share
from megalowrank.parallel.traffic import Traffic
from megalowrank.parallel.wire import Wire, partial_parameters

DIRECTIONS = ("forward", "backward", "step")
SHORT = {"all-gather": "AG", "reduce-scatter": "RS", "all-reduce": "AR"}


@dataclass(frozen=True)
class Linear:
    """One fused projection: whether it is column-parallel, its width, and the rows of its matrices."""

    name: str
    column: bool
    columns: int
    rows: tuple[int, ...]


@dataclass
class Count:
    """Calls of one collective per step, and their bytes."""

    layer: str
    variant: str
    direction: str
    collective: str
    calls: int
    bytes: int
    sent: int


def block(hidden: int, ffn: int) -> list[Linear]:
    """The linears of a gated block."""
    return [
        Linear("qkv", True, hidden, (hidden, hidden, hidden)),
        Linear("o", False, hidden, (hidden,)),
        Linear("gate_up", True, hidden, (ffn, ffn)),
        Linear("down", False, ffn, (hidden,)),
    ]


class _Copy(torch.autograd.Function):
    """Identity, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wire: Wire) -> torch.Tensor:
        ctx.wire = replace(wire, sequence=False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_rows(gradients[0].clone(), ctx.wire), None


class _GatherRows(torch.autograd.Function):
    """This rank's rows -> all rows; gradients are summed over ranks and scattered."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wire: Wire) -> torch.Tensor:
        ctx.wire = wire
        return gather_rows(x, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_rows(gradients[0], ctx.wire), None


class _OwnRows(torch.autograd.Function):
    """All rows -> this rank's rows; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wire: Wire) -> torch.Tensor:
        ctx.wire = wire
        return x.chunk(wire.size)[wire.rank]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_rows(gradients[0], ctx.wire), None


class _GatherColumns(torch.autograd.Function):
    """This rank's part of the last dimension -> all of it; the gradient is this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wire: Wire) -> torch.Tensor:
        ctx.wire = wire
        parts = gather_rows(x[None], replace(wire, sequence=True))
        return torch.cat(tuple(parts), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].chunk(ctx.wire.size, -1)[ctx.wire.rank], None


class NaiveAdapter(torch.nn.Module):
    """A base linear with low-rank tensor-parallel linears beside it; ``rank`` is that of all matrices together."""

    def __init__(self, base: torch.nn.Module, linear: Linear, rank: int, wire: Wire) -> None:
        super().__init__()
        self.base, self.column, self.wire = base, linear.column, wire
        narrow = rank // wire.size if linear.column else rank
        rows = sum(share(rows, 0, wire.size).padded for rows in linear.rows)
        columns = linear.columns if linear.column else share(linear.columns, 0, wire.size).padded
        dtype = next(base.parameters()).dtype
        self.A = torch.nn.Parameter(torch.ones(narrow, columns, dtype=dtype))
        self.B = torch.nn.Parameter(torch.ones(rows, rank, dtype=dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As the base linear, with the adapter's output added."""
        wire, y = self.wire, self.base(x)[0]
        if self.column:
            whole = _GatherRows.apply(x, wire) if wire.sequence else _Copy.apply(x, wire)
            u = _GatherColumns.apply(whole @ self.A.t(), wire)
            return y + _Copy.apply(u, wire) @ self.B.t(), None
        u = reduce_output(x @ self.A.t(), replace(wire, sequence=False))
        wide = _GatherColumns.apply(_Copy.apply(u, wire) @ self.B.t(), wire)
        wide = wide[..., : y.shape[-1]]
        return y + (_OwnRows.apply(wide, wire) if wire.sequence else wide), None


def build(linear: Linear, lora_rank: int | None, wire: Wire, dtype: torch.dtype) -> torch.nn.Module:
    """One of our linears, all ones, W frozen."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=wire.size, sequence_parallel=wire.sequence, params_dtype=dtype,
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    blocks = tuple((f"m{number}", rows) for number, rows in enumerate(linear.rows))
    spec = None if lora_rank is None else LowRankSpec(lora_rank, 1.0)
    flags: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "skip_bias_add": False}
    flags |= {"blocks": blocks, "columns": linear.columns, "lowrank": spec, "wire": wire}
    module: torch.nn.Module
    if linear.column:
        rows = sum(share(rows, 0, wire.size).padded for rows in linear.rows) * wire.size
        module = LowRankColumnParallelLinear(linear.columns, rows, **flags)
    else:
        columns = share(linear.columns, 0, wire.size).padded * wire.size
        module = LowRankRowParallelLinear(columns, sum(linear.rows), input_is_parallel=True, **flags)
    for parameter in module.parameters():
        torch.nn.init.ones_(parameter)
    module.weight.requires_grad_(False)
    return module


def variants(linear: Linear, rank: int, wire: Wire, dtype: torch.dtype) -> dict[str, Callable[[], torch.nn.Module]]:
    """How each variant of a linear is made."""
    total = rank * len(linear.rows)
    return {
        "base": lambda: build(linear, None, wire, dtype),
        "ride": lambda: build(linear, rank, wire.schedule(True), dtype),
        "partial": lambda: build(linear, rank, wire.schedule(False), dtype),
        "naive": lambda: NaiveAdapter(build(linear, None, wire, dtype), linear, total, wire),
    }


def sent(collective: str, size: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` sends for a tensor of ``size`` bytes, with ring algorithms."""
    return (2 if collective == "all-reduce" else 1) * size * (ranks - 1) // ranks


def count(linear: Linear, variant: str, module: torch.nn.Module, wire: Wire, args: argparse.Namespace) -> list[Count]:
    """One step of ``args.micro_batches`` micro-batches of one linear."""
    tokens = args.seq_length // wire.size if wire.sequence and linear.column else args.seq_length
    width = linear.columns if linear.column else share(linear.columns, 0, wire.size).padded
    dtype = next(module.parameters()).dtype
    found: list[Count] = []
    with Traffic({tuple(range(wire.size)): "tensor"}) as traffic:

        def note(direction: str) -> None:
            for (_, name), volume in traffic.take().items():
                size = volume.payload
                found.append(
                    Count(linear.name, variant, direction, name, volume.calls, size, sent(name, size, wire.size))
                )

        for _ in range(args.micro_batches):
            x = torch.ones(tokens, args.micro_batch_size, width, dtype=dtype, requires_grad=True)
            y = module(x)[0]
            note("forward")
            y.sum().backward()
            note("backward")
        partial = [p.grad.flatten() for p in partial_parameters(module) if p.grad is not None]
        if partial:
            dist.all_reduce(torch.cat(partial), group=wire.group)
        note("step")
    return merged(found)


def merged(counts: list[Count]) -> list[Count]:
    """Counts of the same collective of the same layer, variant and direction as one."""
    sums: dict[tuple[str, str, str, str], Count] = {}
    for one in counts:
        key = (one.layer, one.variant, one.direction, one.collective)
        so_far = sums.setdefault(key, replace(one, calls=0, bytes=0, sent=0))
        so_far.calls += one.calls
        so_far.bytes += one.bytes
        so_far.sent += one.sent
    return list(sums.values())


def measure(args: argparse.Namespace) -> list[Count]:
    """All linears of a block in all variants, and their sums as layer "block"."""
    wire = Wire(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), args.sequence_parallel)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    found = []
    for linear in block(args.hidden_size, args.ffn_hidden_size):
        for variant, make in variants(linear, args.lora_rank, wire, dtype).items():
            found += count(linear, variant, make(), wire, args)
    return found + merged([replace(one, layer="block") for one in found])


def table(counts: list[Count]) -> list[str]:
    """Lines of text: a row per layer and variant, a column per direction."""
    rows: list[tuple[str, ...]] = [("layer", "variant", *DIRECTIONS, "calls", "MB sent")]
    for layer, variant in dict.fromkeys((one.layer, one.variant) for one in counts):
        own = [one for one in counts if (one.layer, one.variant) == (layer, variant)]
        cells = [
            ", ".join(f"{c.calls} {SHORT[c.collective]} {c.bytes / 1e6:.3f}" for c in own if c.direction == direction)
            for direction in DIRECTIONS
        ]
        total = f"{sum(one.sent for one in own) / 1e6:.3f}"
        rows.append((layer, variant, *(cell or "-" for cell in cells), str(sum(one.calls for one in own)), total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "AG all-gather, RS reduce-scatter, AR all-reduce: calls and MB per step"]


def parse() -> argparse.Namespace:
    """Flags; raises ConfigError for what does not divide."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--ffn-hidden-size", type=int, default=688)
    parser.add_argument("--lora-rank", type=int, default=32, help="of every logical matrix")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step")
    parser.add_argument("--bf16", action="store_true", help="instead of float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object, too, as the last line")
    args = parser.parse_args()
    ranks = args.tensor_model_parallel_size
    if ranks < 2:
        raise ConfigError("--tensor-model-parallel-size communicates nothing", ranks, ">= 2")
    for name in ("hidden_size", "ffn_hidden_size", "lora_rank", "seq_length", "micro_batch_size", "micro_batches"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive", getattr(args, name), ">= 1")
    if args.lora_rank % ranks:
        raise ConfigError("the naive adapter splits the rank: --lora-rank", args.lora_rank, f"multiples of {ranks}")
    if args.sequence_parallel and args.seq_length % ranks:
        raise ConfigError("--seq-length does not divide", args.seq_length, f"multiples of {ranks}")
    return args


def main() -> None:
    """Parse, start the ranks, count, print."""
    args = parse()
    if "RANK" not in os.environ:
        ranks = str(args.tensor_model_parallel_size)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        env = dict(os.environ, OMP_NUM_THREADS="1", LOCAL_SIZE=ranks)
        sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=env).returncode)
    rank, _, _ = set_rank_environment()
    dist.init_process_group("gloo")
    counts = measure(args)
    dist.destroy_process_group()
    if rank == 0:
        print("\n".join(table(counts)), flush=True)
    if rank == 0 and args.json:
        print(json.dumps({"flags": vars(args), "counts": [asdict(one) for one in counts]}), flush=True)


if __name__ == "__main__":
    run_main(main)
