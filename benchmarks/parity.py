"""Training parity with the reference implementation of SwitchLoRA: the tiny LLaMA on Python source text.

    python benchmarks/parity.py [--out runs/parity] [--seeds 0 1 2]

Hidden 128, ffn 352, 2 layers, 4 heads, bytes, sequences of 64, batch 16, 300 updates, warm-up 30, cosine to 0;
full, LoRA (both starts) and SwitchLoRA (interval 10, descent .5) at rank 16, each at the learning rate that the
reference's sweep chose. Runs ``pretrain_llama.py`` for every method and seed on the sources of the Python standard
library, as the reference runs did; prints a table and one JSON line. The text differs in version and in what is
held out, so means agree to a few hundredths, not exactly.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megalowrank.data.tokens import write_tokens
from megalowrank.engine.metrics import read_metrics
from megalowrank.errors import TrainingError, run_main

ROOT = Path(__file__).resolve().parents[1]
# flags, mean held-out loss of the reference over seeds 0, 1, 2
RUNS: dict[str, tuple[str, float]] = {
    "full": ("--method full --lr 1e-3", 2.016),
    "lora_classic": ("--method lora --lora-rank 16 --lora-init classic --lr 2e-2", 1.922),
    "lora": ("--method lora --lora-rank 16 --lr 2e-2", 1.814),
    "switchlora": (
        "--method switchlora --lora-rank 16 --switch-interval 10 --switch-descent-rate 0.5 --lr 4e-2",
        1.857,
    ),
}
SHAPE = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 --vocab-size 256 "
    "--seq-length 64 --micro-batch-size 16 --global-batch-size 16 --train-iters 300 --lr-warmup-iters 30 "
    "--split 95,5,0 --eval-interval 0 --eval-iters 100 --log-interval 50 --ds-config ds_configs/zero0.json"
)


def source_bytes() -> Iterator[np.ndarray]:
    """The modules of the standard library's top folder, one document each, in an order without meaning."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = np.random.Generator(np.random.Philox(7)).permutation(len(files))
    for i in order.tolist():
        content = files[i].read_bytes()
        if content:
            yield np.frombuffer(content, dtype=np.uint8)


def held_out_loss(name: str, seed: int, out: Path) -> float:
    """Run one job and return its last evaluation."""
    folder = out / f"{name}_{seed}"
    flags = [*SHAPE.split(), *RUNS[name][0].split(), "--seed", str(seed)]
    flags += ["--data-path", str(out / "stdlib"), "--output-dir", str(folder)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "pretrain_llama.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise TrainingError(f"{name} seed {seed} ended with {done.returncode}: {done.stderr[-500:]}")
    return [record["eval_loss"] for record in read_metrics(folder / "metrics.jsonl") if "eval_loss" in record][-1]


def main() -> None:
    """Prepare bytes, run everything, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_tokens(out / "stdlib", source_bytes(), 256)
    found: dict[str, list[float]] = {}
    for name, (_, reference) in RUNS.items():
        found[name] = [held_out_loss(name, seed, out) for seed in args.seeds]
        mean = statistics.fmean(found[name])
        losses = " / ".join(f"{loss:.4f}" for loss in found[name])
        print(f"{name:<14}{losses}   mean {mean:.4f}   reference {reference:.3f}   {mean - reference:+.3f}", flush=True)
    print(json.dumps({name: {"mean": statistics.fmean(x), "losses": x} for name, x in found.items()}))


if __name__ == "__main__":
    run_main(main)
