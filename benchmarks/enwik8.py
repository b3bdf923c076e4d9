"""Every method on enwik8 at equal tokens: held-out loss, trainable share, memory, gradient bytes, speed.

    make data-enwik8 VOCAB=2048
    python benchmarks/enwik8.py --data data/enwik8/enwik8 [--out runs/enwik8] [--seeds 0 1 2] [--iters 400]

llama_9m, sequences of 256, batch 16, warm-up 20, one rank. Each method gets two learning rates at the first seed; the
better one is used for the other seeds. Finished runs are kept, so that a broken benchmark goes on where it stopped.
Prints a table and one JSON line, and writes both and a picture into the output folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
from megalowrank.config import ModelConfig
from megalowrank.engine.metrics import read_metrics
from megalowrank.errors import TrainingError, run_main
from megalowrank.methods import method_class
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.memory import predicted_bytes
from megalowrank.models.accounting.parameters import count_parameters
from megalowrank.models.accounting.table import human

ROOT = Path(__file__).resolve().parents[1]
# flags and two learning rates, the one that was better at 400 updates first
RUNS: dict[str, tuple[str, tuple[str, str]]] = {
    "full": ("--method full", ("2e-3", "1e-3")),
    "lora": ("--method lora --lora-rank 16", ("2e-2", "1e-2")),
    "switchlora": (
        "--method switchlora --lora-rank 16 --switch-interval 20 --switch-descent-rate 0.3",
        ("2e-2", "1e-2"),
    ),
    "relora": (
        "--method relora --lora-rank 16 --relora-interval 100 --relora-reset magnitude "
        "--lr-decay-style cosine_restarts --lr-restart-warmup-iters 10",
        ("2e-3", "5e-3"),
    ),
    "golore": ("--method golore --lora-rank 16 --update-proj-gap 50", ("5e-3", "1e-2")),
    "galore": ("--method galore --lora-rank 16 --update-proj-gap 50", ("2e-2", "1e-2")),
    "lte": (
        "--method lte --lora-rank 16 --lte-heads-per-rank 4 --lte-merge-interval 10 --lte-plain synchronous "
        "--clip-grad 0",
        ("3e-3", "2e-3"),
    ),
}
TOKENS = 16 * 256
SHAPE = (
    "--preset llama_9m --seq-length 256 --micro-batch-size 16 --global-batch-size 16 --lr-warmup-iters 20 "
    "--split 99,1,0 --eval-interval 100 --eval-iters 40 --log-interval 20 --ds-config ds_configs/zero1.json"
)


def train(out: Path, name: str, lr: str, seed: int, args: argparse.Namespace) -> Path:
    """One run, unless it is there; its folder."""
    folder = out / f"{name}_lr{lr}_seed{seed}"
    checkpoints = folder / "checkpoints"
    if (folder / "done").exists() and (checkpoints.exists() or not args.save):
        return folder
    command = [sys.executable, "pretrain_llama.py", *SHAPE.split(), *RUNS[name][0].split(), "--lr", lr]
    command += ["--seed", str(seed), "--train-iters", str(args.iters), "--output-dir", str(folder.absolute())]
    command += ["--data-path", args.data, "--tokenizer-model", f"{args.data}.model"]
    command += ["--save", str(checkpoints.absolute()), "--load", "auto"] if args.save else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise TrainingError(f"{folder.name}: {finished.stderr.strip()[-300:]}")
    (folder / "done").touch()
    print(f"{folder.name}: held-out {held_out(folder):.4f}", flush=True)
    return folder


def held_out(folder: Path) -> float:
    """Held-out loss at the end, nats per token; infinite if it was not a number."""
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line][-1]
    return float("inf") if last["eval_loss"] is None else last["eval_loss"]


def summary(folders: list[Path]) -> dict[str, Any]:
    """What the table says of one method, from the runs of all seeds."""
    run = json.loads((folders[0] / "run.json").read_text())
    kind = method_class(run["method"])
    method = kind(kind.config_class(**run["method_config"]))
    model, adapters = ModelConfig(**run["model"]), method.adapters()
    count = count_parameters(model, adapters)
    rows = predicted_bytes(model, adapters, Layout(zero=1, bf16=False, candidates=method.candidates()))
    speeds = [line["tokens_per_second"] for f in folders for line in read_metrics(f / "metrics.jsonl") if "lr" in line]
    losses = [held_out(folder) for folder in folders]
    return {
        "losses": losses,
        "loss": statistics.mean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "bits_per_byte": statistics.mean(losses) / 0.6931471805599453 / run["bytes_per_token"],
        "trainable": count.trainable / count.total,
        "device_bytes": sum(row.device for row in rows.values()),
        "host_bytes": sum(row.host for row in rows.values()),
        "reduced_bytes": 4 * count.trainable,
        "tokens_per_second": statistics.median(speeds),
        "unigram_loss": run["unigram_loss"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| method | lr | held-out nats per token, mean ± sd | bits per byte | trainable | device bytes | "
        "gradient bytes per step | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        lines.append(
            f"| {name} | {found['lr']} | {found['loss']:.3f} ± {found['spread']:.3f} | {found['bits_per_byte']:.3f} | "
            f"{found['trainable']:.0%} | {human(found['device_bytes'])} | {human(found['reduced_bytes'])} | "
            f"{found['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, list[Path]], picture: Path) -> None:
    """Held-out loss over tokens, one line a seed, one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for number, (name, folders) in enumerate(found.items()):
        for seed, folder in enumerate(folders):
            lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
            millions = [line["step"] * TOKENS / 1e6 for line in lines]
            label = name if not seed else None
            axes.plot(millions, [line["eval_loss"] for line in lines], "o-", ms=3, color=f"C{number}", label=label)
    axes.set(xlabel="million tokens", ylabel="held-out loss (nats per token)", title="enwik8, llama_9m, r = 16")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Train everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prefix of the token files; the tokenizer lies beside as .model")
    parser.add_argument("--out", type=Path, default=Path("runs/enwik8"))
    parser.add_argument("--methods", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iters", type=int, default=400, help="updates of 4096 tokens")
    parser.add_argument("--rates", type=int, choices=(1, 2), default=2, help="learning rates tried of each method")
    parser.add_argument("--save", action="store_true", help="keep a checkpoint of every run at its end")
    args = parser.parse_args()
    results, runs = {}, {}
    for name in args.methods:
        rates = RUNS[name][1][: args.rates]
        tried = {lr: train(args.out, name, lr, args.seeds[0], args) for lr in rates}
        best = min(tried, key=lambda lr: held_out(tried[lr]))
        folders = [train(args.out, name, best, seed, args) for seed in args.seeds]
        results[name], runs[name] = {"lr": best, "folder": str(folders[0]), **summary(folders)}, folders
    draw(runs, args.out / "held_out.png")
    text = table(results)
    (args.out / "table.md").write_text(text + "\n")
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{text}\n{json.dumps(results)}")


if __name__ == "__main__":
    run_main(main)
