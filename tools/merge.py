"""A checkpoint of any method as one of full-rank training: s·B·A merged into W in float32.

    python tools/merge.py runs/quickstart/checkpoints OUT

It has weights alone: --load OUT --finetune starts any method from it, and the other tools take it like any checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
from megalowrank.checkpoint.fresh import fresh_folder
from megalowrank.checkpoint.plain import save_merged
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import run_main


def main() -> None:
    """Command line of ``merge``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of checkpoints (the newest is taken), or one checkpoint")
    parser.add_argument("out", type=Path, help="folder of checkpoints to write; it must not exist")
    parser.add_argument(
        "--without-shortcuts",
        action="store_true",
        help="leave shortcuts of heterolora out: another function than the trained one",
    )
    args = parser.parse_args()
    saved = SavedWeights.open(args.checkpoint, args.without_shortcuts)
    with fresh_folder(args.out) as folder:
        save_merged(saved, folder)
    print(f"{saved.run['method']}, update {saved.checkpoint.step}, merged: written to {args.out}")


if __name__ == "__main__":
    run_main(main)
