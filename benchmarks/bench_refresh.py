"""What a refresh of GoLore costs in updates, part by part: the share of a run that it takes at a gap.

    python benchmarks/bench_refresh.py [--preset llama_60m] [--rank 128] [--tokens 4096] [--gap 200] [--repeat 2]

One rank without DeepSpeed, CPU time of one thread, so that other work on the machine does not count; on an accelerator
the wall time. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
from megalowrank.config import ModelConfig, TrainConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.setup import make_optimizer
from megalowrank.errors import run_main
from megalowrank.lowrank.factors import folded_weights
from megalowrank.methods.base import Context
from megalowrank.methods.golore import GoLore, GoLoreConfig
from megalowrank.models.architecture import LLAMA_FAMILIES, completed
from megalowrank.models.build import build_model
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import initialize_single_process

LENGTH, VOCABULARY = 256, 32000


def seconds(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """The median time of some calls."""
    found = []
    for _ in range(repeat):
        begin = _clock(device)
        work()
        found.append(_clock(device) - begin)
    return statistics.median(found)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of an update, of a probe of everything, and of a refresh with each projector."""
    preset = ModelConfig(preset=args.preset, vocab_size=VOCABULARY)
    config = completed(apply_preset(preset, VOCABULARY, LENGTH, LLAMA_FAMILIES), LLAMA_FAMILIES, LENGTH)
    method = GoLore(GoLoreConfig(lora_rank=args.rank, update_proj_gap=1))
    model = build_model(config, method, length=LENGTH, seed=1)
    model.module.to(device)
    engine = DenseEngine(model.module, model.layers, make_optimizer(model.module, TrainConfig(lr=1e-3)), 1.0)
    ctx = Context(model.layers, engine.state, 1, 1000, 0, 1, lambda n, d: torch.empty(n, dtype=d), engine=engine)
    method.start(ctx)
    rows = max(1, args.tokens // LENGTH)
    ctx.micro_batches = [torch.randint(0, VOCABULARY, (rows, LENGTH + 1)).to(device)]
    engine.train_step(ctx.micro_batches, 1e-3)
    found = {"update": seconds(lambda: engine.train_step(ctx.micro_batches, 1e-3), device, args.repeat)}
    weights = folded_weights(model.layers)
    found["probe"] = seconds(lambda: ctx.probe(weights, lambda i, gradient: None), device, args.repeat)
    for projector in ("svd", "randomized", "random"):
        method.config.projector = projector
        found[projector] = seconds(lambda: method.before_step(0, ctx), device, 1)
    return found


def table(found: dict[str, float], gap: int) -> str:
    """One line for each part, in updates."""
    lines = [f"{'part':<22}{'in updates':>12}{f'share of a run, gap {gap}':>30}"]
    for name, value in found.items():
        share = value / found["update"]
        lines.append(f"{name:<22}{share:>12.2f}{'' if name == 'update' else f'{share / (gap + share):>30.2%}'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", default="llama_60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of an update")
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(f"{folder}/store")
        found = measure(args, device)
    print(table(found, args.gap))
    print(json.dumps({**vars(args), "device": device.type, "seconds": found}))


if __name__ == "__main__":
    run_main(main)
