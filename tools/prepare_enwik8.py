"""Fetch enwik8, clean its wiki markup, and write token files: 68 MB of English text in 8,412 articles."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.data.enwik8 import ENWIK8, enwik8_articles, write_jsonl
from megalowrank.data.manifest import load_manifest
from megalowrank.data.preprocess import Job, preprocess
from megalowrank.data.progress import ProgressLine, report
from megalowrank.data.sources import JsonLines, Source
from megalowrank.data.train_tokenizer import trained_tokenizer
from megalowrank.errors import ConfigError, run_main

_RECIPE = 1
_SAMPLE_CHARACTERS = 20_000_000
_PART_BYTES = 4_000_000


def prepare_enwik8(out: Path, cache: Path, vocab_size: int, tokenizer: str | None, workers: int) -> None:
    """Write ``out``/enwik8.jsonl, .bin, .idx, .sizes, .json, and .model unless ``tokenizer`` names one.

    What is there already, made in the same way, is kept.
    """
    text, model = out / "enwik8.jsonl", tokenizer or str(out / "enwik8.model")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the folder --out", f"{out}: {error.strerror}") from None
    start = time.monotonic()
    if not text.is_file():
        write_jsonl(text, enwik8_articles(cache))
        start = report(f"text: {text}", start)
    sources: list[Source] = [JsonLines(str(text))]
    if tokenizer is None:
        trained_tokenizer(sources, model, vocab_size, _SAMPLE_CHARACTERS, overwrite=True)
        start = report(f"tokenizer: {vocab_size} pieces", start)
    origin = {"archive": ENWIK8.filename, "sha256": ENWIK8.sha256, "recipe": _RECIPE}
    line = ProgressLine(10.0)
    job = Job(sources, str(out / "enwik8"), model, part_bytes=_PART_BYTES, workers=workers, source=origin)
    preprocess(job, line.show, overwrite=True)
    line.close()
    made = load_manifest(job.prefix) or {}
    ratio = made["bytes"] / made["tokens"]
    report(f"tokens: {made['documents']} documents, {made['tokens']} tokens, {ratio:.3f} bytes per token", start)
    print(f"use with: --data-path {job.prefix} --tokenizer-model {model}")


def main() -> None:
    """Command line of ``prepare_enwik8``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/enwik8"), help="folder of the results")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder that keeps the download")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the tokenizer that is trained")
    parser.add_argument("--tokenizer-model", help="sentencepiece file or Hugging Face folder; default: train one")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args()
    prepare_enwik8(args.out, args.cache, args.vocab_size, args.tokenizer_model, args.workers)


if __name__ == "__main__":
    run_main(main)
