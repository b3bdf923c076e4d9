"""CPU time of a training step with full, lora and switchlora, and the share of the method in it.

    python benchmarks/bench_step.py [--steps 300] [--zero 0] [--preset llama_350m --bf16 --micro-batch-size 16]

The three runs take turns, step by step, in one process, so that noise of the machine hits all alike. The
default model is the tiny LLaMA of the comparison with the reference: hidden 128, ffn 352, 2 layers, bytes.
Prints one JSON object. On a CUDA device also tokens per second, MFU and peak memory, each method alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine import dsconfig
from megalowrank.engine.memory import peak_memory
from megalowrank.engine.setup import build_model, make_optimizer
from megalowrank.engine.timing import Stopwatch
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.errors import run_main
from megalowrank.methods import METHODS
from megalowrank.methods.base import Context
from megalowrank.models.accounting.flops import flops_per_token, peak_flops
from megalowrank.models.build import build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import initialize_groups
from megalowrank.parallel.launch import set_rank_environment

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


class Contestant:
    """One method on its own engine, stepped from outside."""

    def __init__(self, name: str, args: argparse.Namespace, model: ModelConfig) -> None:
        train = TrainConfig(
            method=name, lr=1e-3, train_iters=args.steps, seq_length=args.seq_length, bf16=args.bf16,
            micro_batch_size=args.micro_batch_size, global_batch_size=args.micro_batch_size,
        )  # fmt: skip
        settings = {"zero_optimization": {"stage": args.zero}}
        resolved = dsconfig.resolve(settings, train, {"bf16", "lr"}, 1, model.hidden_size or 0)
        groups = initialize_groups(ParallelConfig())
        kind = METHODS[name]
        fields = {"lora_rank": args.rank, "switch_interval": args.interval, "switch_descent_rate": 0.5}
        known = {item.name for item in dataclasses.fields(kind.config_class)}
        self.method = kind(kind.config_class(**{key: value for key, value in fields.items() if key in known}))
        self.model = build_model(build_llama, model, resolved.train, self.method)
        optimizer = make_optimizer(self.model.module, resolved.train)
        self.engine = ZeroEngine(self.model.module, self.model.layers, optimizer, resolved.deepspeed, groups)
        allocate = host_allocator(True)
        self.ctx = Context(
            self.model.layers, self.engine.state, train.seed, args.steps, 0, 1, allocate, engine=self.engine
        )
        self.method.start(self.ctx)
        self.watch = Stopwatch(self.engine.device)
        self.flops = flops_per_token(model, self.method.adapters(), args.seq_length)
        self.cpu: list[float] = []
        self.in_method: list[float] = []

    def step(self, number: int, batch: torch.Tensor) -> None:
        """One update, with its CPU time and that of the method."""
        self.ctx.micro_batches = [batch]
        begin = time.process_time()
        with self.watch.measure():
            self.method.before_step(number, self.ctx)
        middle = time.process_time()
        self.engine.train_step([batch], 1e-3)
        self.in_method.append(middle - begin)
        self.cpu.append(time.process_time() - begin)


def take_turns(contestants: dict[str, Contestant], args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Step all contestants in turn and summarise."""
    source = torch.Generator().manual_seed(0)
    for number in range(args.steps):
        batch = torch.randint(0, vocabulary, (args.micro_batch_size, args.seq_length + 1), generator=source)
        for contestant in contestants.values():
            contestant.step(number, batch)
    warm = args.steps // 10
    means = {name: statistics.fmean(c.cpu[warm:]) for name, c in contestants.items()}
    shares = {name: sum(c.in_method[warm:]) / sum(c.cpu[warm:]) for name, c in contestants.items()}
    pairs = [s / f for s, f in zip(contestants["switchlora"].cpu[warm:], contestants["lora"].cpu[warm:], strict=True)]
    return {
        "cpu_ms_per_step": {name: round(1000 * value, 3) for name, value in means.items()},
        "method_share": {name: round(value, 5) for name, value in shares.items()},
        "switchlora_over_lora_cpu": round(means["switchlora"] / means["lora"], 4),
        "switchlora_over_lora_cpu_median_pair": round(statistics.median(pairs), 4),
        "method_ms_per_step": round(1000 * statistics.fmean(contestants["switchlora"].in_method[warm:]), 4),
    }


def alone(name: str, args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """One method alone on a CUDA device: wall time, with a wait only at both ends."""
    torch.cuda.reset_peak_memory_stats()
    contestant = Contestant(name, args, model)
    device = contestant.engine.device
    batch = torch.randint(0, model.vocab_size or 1, (args.micro_batch_size, args.seq_length + 1))
    warm = max(args.steps // 5, 3)
    for number in range(warm):
        contestant.step(number, batch)
    torch.cuda.synchronize()
    contestant.watch.take()
    begin = time.perf_counter()
    for number in range(warm, args.steps):
        contestant.step(number, batch)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / (args.steps - warm)
    rate = args.micro_batch_size * args.seq_length / seconds
    peak = peak_flops(torch.cuda.get_device_name(device))
    found = {
        "tokens_per_second": round(rate),
        "step_ms": round(1000 * seconds, 2),
        "mfu": None if peak is None else round(rate * contestant.flops / peak, 4),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
        "method_share": round(contestant.watch.take() / (args.steps - warm) / seconds, 5),
    }
    contestant.engine.close()
    return found


def main() -> None:
    """Parse, run, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--zero", type=int, default=0, choices=range(4))
    parser.add_argument("--preset", default=None)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=64)
    args = parser.parse_args()
    set_rank_environment()
    initialize_distributed(timedelta(minutes=5))
    shape = ModelConfig(preset=args.preset) if args.preset else ModelConfig(**TINY)
    model = apply_preset(shape, None)
    found: dict[str, Any] = {"model": args.preset or "tiny", "zero": args.zero, "bf16": args.bf16, "rank": args.rank}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["methods"] = {name: alone(name, args, model) for name in ("full", "lora", "switchlora")}
    else:
        contestants = {name: Contestant(name, args, model) for name in ("full", "lora", "switchlora")}
        found |= take_turns(contestants, args, model.vocab_size or 1)
    torch.distributed.destroy_process_group()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    run_main(main)
