"""Turn text into Megatron token files: JSON lines, plain text, parquet, datasets folders, datasets on the hub.

Parts are tokenized by several processes; a killed run continues where it was. Flags have Megatron's names where
it has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.data.hub import HubDataset, SavedDataset, is_saved_dataset
from megalowrank.data.manifest import load_manifest
from megalowrank.data.preprocess import PART_BYTES, Job, preprocess
from megalowrank.data.progress import ProgressLine
from megalowrank.data.sources import SAMPLE_BY, Source, file_sources
from megalowrank.data.train_tokenizer import trained_tokenizer
from megalowrank.errors import ConfigError, run_main


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument --", "--"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="files, folders of files, save_to_disk folders"
    )
    text.add_argument("--dataset", metavar="NAME", help="dataset on the hub, streamed, e.g. allenai/c4")
    text.add_argument("--dataset-config", metavar="NAME", help="its configuration, e.g. en")
    text.add_argument("--dataset-split", default="train", metavar="NAME", help="its split (default: train)")
    text.add_argument("--dataset-revision", metavar="COMMIT", help="commit, tag or branch (default: the newest commit)")
    text.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="member or column (default: text)"
    )
    text.add_argument(
        "--sample-by", choices=SAMPLE_BY, default="document", help="documents of plain text (default: a file)"
    )
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="sentencepiece file, Hugging Face folder or name")
    tokens.add_argument("--tokenizer-type", metavar="TYPE", help="SentencePieceTokenizer or HuggingFaceTokenizer")
    tokens.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces: OUTPUT_PREFIX.model"
    )
    tokens.add_argument("--tokenizer-sample-mb", type=float, default=20.0, metavar="MB", help="text it is trained on")
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with EOS (default: yes)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", metavar="PREFIX", help="path of the results, without ending")
    output.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    output.add_argument("--part-mb", type=float, default=PART_BYTES / 1e6, metavar="MB", help="input of one part")
    output.add_argument(
        "--log-interval", type=float, default=10.0, metavar="S", help="seconds between lines of progress"
    )
    output.add_argument("--overwrite", action="store_true", help="replace results made from something else")
    return parser


def sources_of(args: argparse.Namespace) -> list[Source]:
    """Where the documents come from; ConfigError for none, both or several keys."""
    if bool(args.input) == bool(args.dataset):
        raise ConfigError("one of --input and --dataset is needed", "both" if args.input else "neither")
    if len(args.json_keys) != 1:
        raise ConfigError("--json-keys takes one key", " ".join(args.json_keys), "one run for each key")
    key = args.json_keys[0]
    if args.dataset:
        return [HubDataset.pin(args.dataset, args.dataset_config, args.dataset_split, args.dataset_revision, key)]
    found: list[Source] = []
    for path in args.input:
        saved = is_saved_dataset(path)
        found += [SavedDataset(path, args.dataset_split, key)] if saved else file_sources(path, key, args.sample_by)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``preprocess_data``."""
    args = _parser().parse_args(argv)
    if not args.output_prefix:
        raise ConfigError("--output-prefix is missing", None, "a path without ending")
    for name in ("part_mb", "tokenizer_sample_mb", "log_interval"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is out of range", getattr(args, name), "> 0")
    if (args.tokenizer_model is None) == (args.vocab_size is None):
        raise ConfigError("one of --tokenizer-model and --vocab-size (to train one) is needed")
    sources, model = sources_of(args), args.tokenizer_model
    if model is None:
        model = f"{args.output_prefix}.model"
        trained_tokenizer(sources, model, args.vocab_size, int(args.tokenizer_sample_mb * 1e6))
    job = Job(
        sources, args.output_prefix, model, args.tokenizer_type, args.append_eod, int(args.part_mb * 1e6), args.workers
    )
    line = ProgressLine(args.log_interval)
    made = preprocess(job, line.show, args.overwrite)
    line.close()
    manifest = load_manifest(args.output_prefix) or {}
    if not made:
        print(f"{args.output_prefix}.bin is there already, made from the same")
    print(json.dumps({name: manifest[name] for name in ("documents", "tokens", "bytes", "vocab_size")}))
    print(f"use with: --data-path {args.output_prefix} --tokenizer-model {model}")


if __name__ == "__main__":
    run_main(main)
