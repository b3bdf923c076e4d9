"""Kill a training run with SIGKILL, again and again, and see that it goes on as if nothing had happened.

    python tools/soak_checkpoint.py [--random 100] [--every 1] [--json]

The real program runs on two ranks with a tiny LLaMA and saves often, in the background and at once. It is killed at
every write point of a save (before, halfway through and after each change of the disk: one more save, the first one in
a folder, one that replaces an older one), each rank in turn, and at random moments, one rank or all. After each kill
the newest complete checkpoint must be there and verify; the run goes on with --load auto from it, and in the end its
log lines and its tensors equal those of an undisturbed run, bit by bit. Then files of a checkpoint are damaged: it is
refused by name, and --load auto takes the one before. Exit code 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megalowrank.quiet  # noqa: F401 - it sets filters before the libraries are imported

# isort: split
import numpy as np
from soaking.damage import CASES, damaged_all, damaged_newest
from soaking.story import Story

from megalowrank.config import at_least
from megalowrank.data.tokens import write_tokens
from megalowrank.errors import ConfigError, run_main

WORLD, VOCABULARY = 2, 320
MODEL = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2"
METHOD = "--method switchlora --lora-rank 8 --switch-interval 4 --switch-freeze-steps 2 --switch-descent-rate 1"
TRAIN = "--seq-length 32 --global-batch-size 4 --lr 1e-2 --lr-warmup-iters 2 --log-interval 1 --split 1,0,0"
SAVING = f"--vocab-size {VOCABULARY} --save-interval 2 --keep-last 2"
KINDS = {"first": "the first save in a folder", "next": "one more save", "again": "one that replaces an older one"}
MODES = ("--async-save", "--no-async-save")


class Soak:
    """All stories of one soak in ``folder``, one after the other; each gets as far as ``updates``."""

    def __init__(self, folder: Path, updates: int, seed: int) -> None:
        self.folder, self.updates, self.rng = folder, updates, random.Random(seed)
        gc.freeze()  # forks then copy fewer pages
        self.counts: Counter[str] = Counter()
        self.points: dict[str, list[str]] = {}
        self._stories = 0
        config = folder / "zero1.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        drawn = np.random.default_rng(0)
        write_tokens(folder / "drawn", [drawn.integers(0, VOCABULARY, 500) for _ in range(100)], VOCABULARY)
        words = f"{MODEL} {METHOD} {TRAIN} {SAVING} --train-iters {updates}".split()
        self.flags = [*words, "--ds-config", str(config), "--data-path", str(folder / "drawn")]
        self.undisturbed = self.story()
        self.undisturbed.finish()
        self.current = self.story()

    def story(self) -> Story:
        """A new run."""
        self._stories += 1
        return Story(self.flags, WORLD, self.folder / f"run_{self._stories}", self.counts)

    def conclude(self) -> None:
        """Let the current run end and compare it; then there is a new one."""
        self.current.finish()
        self.current.compare(self.undisturbed)
        self.current = self.story()

    def sweep(self, kind: str, rank: int, mode: str, every: int) -> None:
        """Kill ``rank`` at every ``every``-th write point of a save of this kind."""
        seen = self.points[f"{KINDS[kind]}, rank {rank}, {mode}"] = []
        for point in range(1 + self.rng.randrange(every), 1000, every):
            self._prepare(kind)
            note = self.current.kill_at(point, rank, mode)
            seen.append(note["point"])
            if note["over"]:
                return

    def _prepare(self, kind: str) -> None:
        """Bring the current run to where its next save is of this kind."""
        if (kind == "first" and self.current.best) or self.current.best + 8 > self.updates:
            self.conclude()
        if kind != "first" and self.current.best < 4:
            self.current.finish("--exit-interval", "4")
        if kind == "again":
            self.current.step_back()

    def at_random(self, kills: int) -> None:
        """Kill one rank or all at random moments, in the middle of starting, training, saving or ending."""
        for _ in range(kills):
            ranks, mode = self.rng.choice([[0], [1], [0, 1]]), self.rng.choice(MODES)
            updates, share = self.rng.choice([(0, 1.0), *((at, 0.1) for at in range(1, 10))])
            while not self.current.kill_after(updates, share * self.rng.random(), ranks, mode):
                self.conclude()


def sweeps() -> Iterator[tuple[str, int, str]]:
    """Kind of save, rank and mode of every sweep; ranks but the first do the same in all kinds."""
    yield from (("next", rank, mode) for mode in MODES for rank in range(WORLD))
    yield from ((kind, 0, MODES[0]) for kind in ("first", "again"))


def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, with counts; a checkpoint that is lost is a TrainingError."""
    started = time.monotonic()
    found = Soak(folder, args.updates, args.seed)
    say(args, f"an undisturbed run of {args.updates} updates is there after {time.monotonic() - started:.0f} s")
    for kind, rank, mode in sweeps() if args.every else ():
        found.sweep(kind, rank, mode, args.every)
        say(args, f"{KINDS[kind]}, rank {rank}, {mode}: {dict(found.counts)}")
    if args.random:
        found.at_random(args.random)
        say(args, f"random moments: {dict(found.counts)}")
    found.conclude()
    if args.damage:
        damage_checkpoints(found)
    counts = {"checkpoints lost": 0, **found.counts}
    return {"seconds": round(time.monotonic() - started, 1), **counts, "write points": found.points}


def damage_checkpoints(found: Soak) -> None:
    """Every kind of damage to the checkpoints of the undisturbed run."""
    for file, damage in CASES:
        damaged_newest(found.undisturbed.copied_to(found.story()), file, damage)
    damaged_all(found.undisturbed.copied_to(found.story()))
    found.counts["damaged checkpoints refused by name"] += len(CASES)


def say(args: argparse.Namespace, text: str) -> None:
    """Progress, unless the output is to be JSON."""
    if not args.json:
        print(text, flush=True)


def main() -> None:
    """Command line of ``soak_checkpoint``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--random", type=int, default=100, help="kills at random moments; default: 100")
    parser.add_argument(
        "--every", type=int, default=1, help="kill at every so many-th write point; 0: none; default: 1"
    )
    parser.add_argument("--no-damage", dest="damage", action="store_false", help="leave out damaged files")
    parser.add_argument("--updates", type=int, default=120, help="length of a run; default: 120")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are written and left; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    args = parser.parse_args()
    for name, least in (("random", 0), ("every", 0), ("updates", 12)):
        at_least(name, getattr(args, name), least)
    if args.folder is not None and args.folder.exists():
        raise ConfigError("--folder exists already", args.folder)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(args, folder)
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    run_main(main)
