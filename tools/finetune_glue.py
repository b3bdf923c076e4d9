"""Compare pre-trained models by fine-tuning all of them on labelled tasks: a table of means and spreads over seeds.

    python tools/finetune_glue.py runs/full runs/switchlora --tasks data/reviews --output runs/glue
    python tools/finetune_glue.py full=hf/full lora=hf/lora --tasks rte mrpc cola

A model is a Hugging Face folder, or a checkpoint or a run of megalowrank, which is exported first, low-rank factors
merged; every weight is trained. A task is a folder with train.jsonl and validation.jsonl of text, perhaps text_pair,
and label, or a task of GLUE by name where the hub can be reached. What is finished is kept in --output: the same
command goes on where it was killed. Prints the table, and writes table.md and results.json there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers
from finetuning.models import Candidate, candidates, load_ready, tokenizer_of
from finetuning.results import Cell, markdown, read_cell, summary, write_cell
from finetuning.rows import encode_task
from finetuning.train import Recipe, finetune, positions

from megalowrank.data.files import write_whole
from megalowrank.data.labelled import LabelledData, load_labelled
from megalowrank.errors import ConfigError, TrainingError, run_main

_SUBSET_SEED = 0


class Comparison:
    """Every model on every task with every seed; what is in ``out`` already is not done again."""

    def __init__(self, models: list[Candidate], tasks: list[LabelledData], recipe: Recipe, out: Path) -> None:
        self.models, self.tasks, self.recipe, self.out = models, tasks, recipe, out
        self.settings: dict[Cell, dict[str, Any]] = {}  # what a finished cell must agree in
        self.done: dict[Cell, dict[str, Any]] = {}
        self.failed: list[str] = []

    def run(self, seeds: Sequence[int]) -> None:
        """Fine-tune what is missing; cells that fail are named in ``failed`` and the others go on."""
        pairs = [(model, task) for model in self.models for task in self.tasks]
        weights = {model.name: model.fingerprint() for model in self.models}
        for model, task in pairs:
            settings = {**asdict(self.recipe), "weights": weights[model.name], "examples": fingerprint(task)}
            for seed in seeds:
                self.settings[cell := Cell(model.name, task.name, seed)] = settings
                if (found := read_cell(cell, self.out, settings)) is not None:
                    self.done[cell] = found
        print(f"{len(pairs) * len(seeds)} to fine-tune, {len(self.done)} of them finished before", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            for model, task in pairs:
                cells = [Cell(model.name, task.name, seed) for seed in seeds]
                self._fill(model, task, [cell for cell in cells if cell not in self.done], Path(temporary))

    def _fill(self, model: Candidate, task: LabelledData, cells: Sequence[Cell], temporary: Path) -> None:
        """Fine-tune one model on one task."""
        if not cells:
            return
        folder = load_ready(model, temporary, print)
        length = min(self.recipe.max_length, positions(folder))
        rows = encode_task(tokenizer_of(folder, model.name), task, length)
        if rows.cut:
            print(f"{model.name}, {task.name}: {rows.cut} texts are cut to {length} tokens")
        for cell in cells:
            try:
                self.done[cell] = finetune(folder, task, rows, self.recipe, cell.seed)
            except TrainingError as error:
                self.failed.append(str(cell))
                print(f"{cell}: {error}", flush=True)
                continue
            write_cell(cell, self.out, self.settings[cell], self.done[cell])
            last = next(iter(self.done[cell].values()))[-1]
            print(f"{cell}: " + ", ".join(f"{name} {value:.4f}" for name, value in last.items()), flush=True)

    def write(self) -> str:
        """Write table.md and results.json; returns the table."""
        recipe = asdict(self.recipe)
        records = summary(self.done)
        text = markdown(records, ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None))
        write_whole(self.out / "table.md", text.encode())
        write_whole(
            self.out / "results.json", (json.dumps({"recipe": recipe, "results": records}, indent=1) + "\n").encode()
        )
        return text


def fingerprint(task: LabelledData) -> str:
    """SHA-256 of all examples that count."""
    return hashlib.sha256(repr((task.labels, task.train, task.validation)).encode()).hexdigest()


def load_tasks(names: Sequence[str], count: int | None) -> list[LabelledData]:
    """The tasks, with at most ``count`` training examples, the same for every model and seed."""
    found: dict[str, LabelledData] = {}
    for name in names:
        task = load_labelled(name)
        if task.name in found:
            raise ConfigError("two tasks have one name", task.name, "folders of different names")
        for note in task.notes:
            print(f"note: {note}")
        if count is not None and count < len(task.train):
            task = replace(task, train=random.Random(_SUBSET_SEED).sample(task.train, count))
        found[task.name] = task
    return list(found.values())


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder of a model, or NAME=FOLDER")
    found.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="folder, or name of a GLUE task")
    found.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    found.add_argument("--epochs", type=int, default=Recipe.epochs)
    found.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    found.add_argument("--lr", type=float, default=Recipe.lr, help="at the start; it falls linearly to 0")
    found.add_argument(
        "--max-length", type=int, default=Recipe.max_length, help="tokens; at most the model's positions"
    )
    found.add_argument("--train-examples", type=int, help="of every task, drawn once; default: all")
    found.add_argument("--bf16", action="store_true", help="forward and backward in bfloat16")
    found.add_argument("--output", type=Path, default=Path("runs/glue"), help="folder of the results")
    return found


def main() -> None:
    """Command line of ``finetune_glue``."""
    args = parser().parse_args()
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("transformers' Trainer needs the package accelerate", None, "pip install accelerate")
    recipe = Recipe(args.epochs, args.batch_size, args.lr, args.max_length, args.train_examples, args.bf16)
    recipe.check()
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError("--seeds names one twice", " ".join(map(str, args.seeds)))
    # the trainer would multiply the batch by the devices it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it says that every head is new
    models = candidates(args.checkpoints)
    found = Comparison(models, load_tasks(args.tasks, args.train_examples), recipe, args.output)
    found.run(args.seeds)
    print(found.write())
    if found.failed:
        raise TrainingError(f"{len(found.failed)} diverged and are not in the table: {'; '.join(found.failed)}")


if __name__ == "__main__":
    run_main(main)
