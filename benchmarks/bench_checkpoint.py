"""What checkpoints cost: seconds of training lost per save, seconds to verify and to load, bytes per parameter.

    python benchmarks/bench_checkpoint.py [--preset llama_20m] [--ranks 1] [--updates 24] [--every 6] [--rounds 3]

Trains with the real program, full, lora and switchlora: without saves, with saves at once and with saves in the
background, in turns, several rounds. ``lost_per_save`` is what the updates of a run with saves take longer than those
of one without, the noise of the machine and what writing in the background takes from training included;
``stood_still_per_save`` is how long the loop waited in a save. Prints one JSON object: seconds as median, smallest and
largest of rounds or saves; bytes of the checkpoint for each parameter of the model, factors not counted as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megalowrank.quiet  # noqa: F401 - it sets filters before the libraries are imported

# isort: split
import numpy as np
from inspecting.facts import kinds

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.config import ModelConfig, at_least
from megalowrank.data.tokens import write_tokens
from megalowrank.engine import setup
from megalowrank.engine.loop import Position
from megalowrank.engine.resume import RunState
from megalowrank.engine.saving import Saver
from megalowrank.errors import TrainingError, run_main
from megalowrank.models.build import build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.launch import free_port

LOWRANK = ("--lora-rank", "32")
RUNS: dict[str, tuple[str, ...]] = {"full": (), "lora": LOWRANK, "switchlora": (*LOWRANK, "--switch-interval", "40")}
MODES: dict[str, tuple[str, ...]] = {"none": (), "sync": ("--no-async-save",), "async": ("--async-save",)}


def in_forks(ranks: int, work: Callable[[], None], log: Path) -> None:
    """Run ``work`` on ranks that are forks of this process; TrainingError if one fails."""
    port, children = str(free_port()), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            _fork(work, log)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise TrainingError(f"a run failed: {log.read_text()[-2000:]}")


def _fork(work: Callable[[], None], log: Path) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        run_main(work)
        code = 0
    finally:
        os._exit(code)


class Bench:
    """Runs of one preset in ``folder``; ``args`` are the flags of this program."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        vocabulary = apply_preset(ModelConfig(preset=args.preset), None).vocab_size or 1
        tokens = np.random.default_rng(0).integers(0, vocabulary, 400 * args.seq_length)
        write_tokens(folder / "drawn", [tokens], vocabulary)
        config = folder / "deepspeed.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": args.zero}}))
        batch = str(args.micro_batch_size * args.ranks)
        self.flags = [
            "--preset", args.preset, "--ds-config", str(config), "--data-path", str(folder / "drawn"),
            "--split", "1,0,0", "--seq-length", str(args.seq_length), "--global-batch-size", batch,
            "--lr", "1e-3", "--log-interval", "1", "--train-iters", str(args.updates),
            *(["--bf16"] if args.bf16 else []),
        ]  # fmt: skip

    def run(self, method: str, mode: str) -> dict[str, Any]:
        """One run: seconds of its updates after the first ``every``, saves among them, and of each save."""
        out, note = self.folder / f"{method}_{mode}", self.folder / "note.json"
        flags = [*self.flags, "--method", method, *RUNS[method], *MODES[mode], "--output-dir", str(out)]
        if mode != "none":
            flags += ["--save", str(out / "saved"), "--save-interval", str(self.args.every), "--keep-last", "1"]
        self._clear(out)

        def work() -> None:
            setattr(setup, "Saver", NotedSaver)  # noqa: B010
            setup.pretrain(flags, build_llama, "pretrain_llama.py")
            if os.environ["RANK"] == "0":
                note.write_text(json.dumps(NotedSaver.waits))

        in_forks(self.args.ranks, work, self.folder / "log.txt")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(line["step_time_ms"] for line in lines if line["step"] > self.args.every) / 1000.0
        return {"seconds": seconds, "waits": json.loads(note.read_text())}

    def load(self, method: str) -> float:
        """Seconds in which a resumed run has its state back, hashes verified."""
        note = self.folder / "note.json"
        flags = [*self.flags, "--method", method, *RUNS[method], "--load", str(self.folder / f"{method}_sync/saved")]

        def work() -> None:
            load, taken = RunState.load, []

            def timed(state: RunState, output: Any) -> Any:
                started = time.perf_counter()
                position = load(state, output)
                taken.append(time.perf_counter() - started)
                return position

            setattr(RunState, "load", timed)  # noqa: B010
            setup.pretrain([*flags, "--dry-run"], build_llama, "pretrain_llama.py")
            if os.environ["RANK"] == "0":
                note.write_text(json.dumps(taken[0]))

        in_forks(self.args.ranks, work, self.folder / "log.txt")
        return json.loads(note.read_text())

    def method(self, name: str) -> dict[str, Any]:
        """All figures of one method."""
        rounds = [{mode: self.run(name, mode) for mode in MODES} for _ in range(self.args.rounds)]
        saves = (self.args.updates - 1) // self.args.every
        lost = {mode: [(it[mode]["seconds"] - it["none"]["seconds"]) / saves for it in rounds] for mode in MODES}
        folder = self.folder / f"{name}_sync" / "saved"
        held = kinds(Checkpoint.open(folder))
        return {
            "update_seconds": spread([it["none"]["seconds"] / (self.args.updates - self.args.every) for it in rounds]),
            **{
                mode: {
                    "lost_per_save": spread(lost[mode]),
                    "stood_still_per_save": spread([wait for it in rounds for wait in it[mode]["waits"]]),
                }
                for mode in ("sync", "async")
            },
            "verify_seconds": spread([_seconds(lambda: Checkpoint.open(folder)) for _ in range(self.args.rounds)]),
            "load_seconds": spread([self.load(name) for _ in range(self.args.rounds)]),
            "bytes": held["bytes"],
            "parameters": held["parameters"],
            "bytes_per_parameter": round(held["bytes_per_parameter"], 3),
            "by_kind": {kind: round(it["bytes_per_parameter"], 3) for kind, it in held["kinds"].items()},
        }

    def _clear(self, out: Path) -> None:
        for path in sorted(out.rglob("*"), reverse=True) if out.exists() else ():
            path.unlink() if path.is_file() else path.rmdir()


class NotedSaver(Saver):
    """A Saver that remembers how many seconds each save held training up."""

    waits: list[float] = []

    def save(self, position: Position) -> None:
        """Save."""
        before = self.lost
        super().save(position)
        self.waits.append(self.lost - before)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(values: list[float]) -> list[float]:
    """Median, smallest and largest."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    """Parse, run, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="llama_20m")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", type=int, default=1, choices=range(4))
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="updates between saves; default: 6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    for name in ("ranks", "every", "rounds"):
        at_least(name, getattr(args, name), 1)
    at_least("updates", args.updates, 2 * args.every)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(args, Path(folder))
        found = {name: bench.method(name) for name in args.methods}
    print(json.dumps({"settings": vars(args), "methods": found}), flush=True)


if __name__ == "__main__":
    run_main(main)
