"""Fetch movie-review snippets and write them as a task of two classes: 9,065 to train on, 1,007 to validate with.

    python tools/prepare_reviews.py data/reviews
    python pretrain_llama.py --task classification --labelled-data data/reviews ...

What is downloaded is kept in --cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.data.reviews import CLASSES, review_examples, write_examples
from megalowrank.errors import ConfigError, run_main


def prepare_reviews(out: Path, cache: Path) -> None:
    """Write ``out``/validation.jsonl and ``out``/train.jsonl, in that order, each whole or not at all."""
    train, validation = review_examples(cache)
    try:
        write_examples(out / "validation.jsonl", validation, CLASSES)
        write_examples(out / "train.jsonl", train, CLASSES)
    except OSError as error:
        raise ConfigError("cannot write the folder of the task", f"{out}: {error.strerror}") from None
    share = sum(int(it.label) for it in validation) / len(validation)
    print(f"{out}: {len(train)} examples to train on, {len(validation)} to validate with, {share:.1%} of them positive")
    print(f"use with: --task classification --labelled-data {out}")


def main() -> None:
    """Command line of ``prepare_reviews``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder that keeps the download")
    args = parser.parse_args()
    prepare_reviews(args.out, args.cache)


if __name__ == "__main__":
    run_main(main)
