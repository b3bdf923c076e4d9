"""Find out which modules deserve rank, and write it as a file for --lora-config.

Everything this tool does not know is a flag of the program that would train the model. It trains with every module on
for --warmup-iters updates, scores all modules, and stops; the run itself is not kept:

    python tools/search_rank.py ranks.toml --score snip --warmup-iters 50 --budget 0.25 \\
        --program pretrain_llama.py --ds-config ds_configs/zero2.json --preset llama_60m --data-path data/corpus …
    deepspeed pretrain_llama.py --method lora --lora-config ranks.toml …
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalowrank.quiet  # noqa: F401 - it sets filters before the libraries are imported
from megalowrank.data.files import write_whole
from megalowrank.engine.metrics import read_metrics
from megalowrank.engine.setup import pretrain
from megalowrank.errors import ConfigError, run_main
from megalowrank.lowrank.rank_table import Entry, RankTable
from megalowrank.methods.allocation import allocate
from megalowrank.methods.heterolora import HeteroLoRA, HeteroLoRAConfig, is_shortcut
from megalowrank.methods.importance import SCORES
from megalowrank.models.architecture import GPT_FAMILIES, LLAMA_FAMILIES
from megalowrank.models.build import build_gpt, build_llama
from megalowrank.parallel.launch import set_rank_environment

PROGRAMS = {"pretrain_llama.py": (build_llama, LLAMA_FAMILIES), "pretrain_gpt.py": (build_gpt, GPT_FAMILIES)}
NEVER = 10**9
OWN = ("--method", "--train-iters", "--output-dir", "--save", "--epochs")


def parser() -> argparse.ArgumentParser:
    """The tool's own flags."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    defaults = HeteroLoRAConfig()
    found.add_argument("out", type=Path, help="TOML file to write")
    found.add_argument("--program", choices=tuple(PROGRAMS), default="pretrain_llama.py", help="whose flags follow")
    found.add_argument(
        "--score", choices=tuple(SCORES), default=defaults.hetero_score, help="what modules are ranked by"
    )
    found.add_argument("--warmup-iters", type=int, default=0, help="updates with every module on before the score")
    found.add_argument("--score-batches", type=int, default=32, help="global batches that the score is computed from")
    found.add_argument(
        "--budget", type=float, default=defaults.hetero_budget, help="share of the modules that get rank"
    )
    found.add_argument(
        "--granularity", choices=("layer", "network"), default="layer",
        help="an entry for every module, or one for all modules of a kind, by the sum of their scores",
    )  # fmt: skip
    found.add_argument(
        "--shortcuts", choices=("off", "separated", "combined"), default="off",
        help="shortcuts too, ranked apart or with the matrices; train the file with --method heterolora "
        "--hetero-interval 0 and the same --hetero-shortcuts",
    )  # fmt: skip
    return found


def main() -> None:
    """Command line of ``search_rank``; every rank of a launcher may call it."""
    args, rest = parser().parse_known_args()
    typed = {word.partition("=")[0].replace("_", "-"): word for word in rest}
    for flag in OWN:
        if flag in typed:
            raise ConfigError(f"{typed[flag]} is chosen by this tool", None, "the flags of model, data and layout")
    if "--load" in typed and "--finetune" not in typed:
        raise ConfigError("--load resumes a run, a search is a new one", typed["--load"], "--load with --finetune")
    rank, _, _ = set_rank_environment()
    folder = args.out.with_name(args.out.name + ".search")
    build, families = PROGRAMS[args.program]
    pretrain([*rest, *_flags(args, folder)], build, args.program, families)
    if rank == 0:
        event = next(e for e in reversed(read_metrics(folder / "metrics.jsonl")) if e.get("event") == "reallocation")
        if "kept" in event:
            raise ConfigError("no ranking could be made", event["kept"], "another score, learning rate or warm-up")
        table = table_of({**event["on"], **event["off"]}, args, json.loads((folder / "run.json").read_text()))
        write_whole(args.out, table.text().encode())
        shutil.rmtree(folder)
        print(f"{len(table.entries)} entries are on: written to {args.out}")


def _flags(args: argparse.Namespace, folder: Path) -> list[str]:
    words = {
        "--method": HeteroLoRA.name, "--train-iters": args.warmup_iters + 1, "--output-dir": folder,
        "--hetero-interval": NEVER, "--hetero-warmup-iters": args.warmup_iters, "--hetero-score": args.score,
        "--hetero-score-batches": args.score_batches, "--hetero-budget": args.budget,
        "--hetero-shortcuts": args.shortcuts,
    }  # fmt: skip
    return [str(word) for pair in words.items() for word in pair]


def table_of(scores: Mapping[str, float], args: argparse.Namespace, run: Mapping[str, Any]) -> RankTable:
    """The best within the budget get the rank and alpha of the search (``run``: its run.json), all others none."""
    entry = Entry(True, run["method_config"]["lora_rank"], run["method_config"]["lora_alpha"])
    layered, found = args.granularity == "layer", dict(scores)
    if not layered:
        kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in scores)
        found = {k: sum(s for name, s in scores.items() if name.rsplit(".", 1)[-1] == k) for k in kinds}
    shortcut = [
        any(is_shortcut(name) for name in scores if name.rsplit(".", 1)[-1] == f.rsplit(".", 1)[-1]) for f in found
    ]
    key = (run["train"]["seed"], "search", args.score)
    choice = allocate(list(found.values()), shortcut, args.budget, args.shortcuts, key)
    chosen = [name for name, on in zip(found, choice.on, strict=True) if on]
    keys = [f"{name.split('.')[1]}.{name.rsplit('.', 1)[-1]}" if layered else name for name in chosen]
    return RankTable(Entry(enabled=False), dict.fromkeys(keys, entry), layered)


if __name__ == "__main__":
    run_main(main)
