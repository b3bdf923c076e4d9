"""What ``compare_methods.sh`` asks for between its steps: the runs of the better learning rates, and the table.

    python tools/compare_methods.py models OUT/pretrain               NAME FOLDER, a line for every method
    python tools/compare_methods.py table OUT/pretrain OUT/glue --out OUT

The table and the picture put held-out bits per byte of ``benchmarks/enwik8.py`` beside what ``finetune_glue.py`` says
of the same models.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotting.style import MAIN, new_figure, save

from megalowrank.data.files import write_whole
from megalowrank.errors import ConfigError, run_main

Results = dict[str, dict[str, Any]]
Records = list[dict[str, Any]]
_FILE = "results.json"


def read_results(folder: Path) -> Any:
    """results.json of a folder; ConfigError without one."""
    try:
        return json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no usable {_FILE}", str(error)[:100], "a finished comparison") from None


def table(pretrained: Results, records: Records) -> str:
    """A row for every method, a column for every measure of every task: mean ± sample standard deviation over seeds."""
    columns = list(dict.fromkeys((it["task"], it["measure"]) for it in records if it["measure"] != "loss"))
    by_place = {(it["model"], it["task"], it["measure"]): it["last"] for it in records}
    head = ["method", "lr", "held-out bits per byte", *(f"{task} {measure}" for task, measure in columns)]
    lines = [head, ["---"] * len(head)]
    for name, found in pretrained.items():
        cells = [by_place.get((name, *column)) for column in columns]
        lines.append([name, found["lr"], f"{found['bits_per_byte']:.3f}", *map(_shown, cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.4f}" + ("" if found["stdev"] is None else f" ± {found['stdev']:.4f}")


def draw(pretrained: Results, records: Records, out: Path) -> None:
    """The first measure of the first task over bits per byte, a point a method, its spread as a line."""
    first = records[0]["task"], records[0]["measure"]
    figure, (ax,) = new_figure("Held-out text and the task after fine-tuning")
    for record in records:
        if (record["task"], record["measure"]) != first or record["model"] not in pretrained:
            continue
        x, last = pretrained[record["model"]]["bits_per_byte"], record["last"]
        ax.errorbar(x, last["mean"], yerr=last["stdev"] or 0.0, fmt="o", color=MAIN, capsize=3)
        ax.annotate(record["model"], (x, last["mean"]), xytext=(6, 4), textcoords="offset points", fontsize=9)
    ax.set(xlabel="held-out bits per byte of pre-training", ylabel=" ".join(first))
    save(figure, out)


def main() -> None:
    """Command line of ``compare_methods``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models", help="method and folder of its run with the better learning rate")
    end = commands.add_parser("table", help="table and picture")
    for command in (models, end):
        command.add_argument("pretrained", type=Path, help="--out of benchmarks/enwik8.py")
    end.add_argument("finetuned", type=Path, help="--output of tools/finetune_glue.py")
    end.add_argument("--out", type=Path, required=True, help="folder of methods.md and methods.png")
    args = parser.parse_args()
    pretrained: Results = read_results(args.pretrained)
    if args.command == "models":
        print("\n".join(f"{name} {found['folder']}" for name, found in pretrained.items()))
        return
    records: Records = read_results(args.finetuned)["results"]
    if not records:
        raise ConfigError(f"{args.finetuned} has no results", None, "a finished comparison")
    text = table(pretrained, records)
    write_whole(args.out / "methods.md", text.encode())
    print(text)
    draw(pretrained, records, args.out / "methods.png")


if __name__ == "__main__":
    run_main(main)
