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
from megalowrank.data.preprocess import PART_BYTES, Job, errors_of_files, preprocess
from megalowrank.data.progress import ProgressLine
from megalowrank.data.sources import SAMPLE_BY, PlainText, Source, file_sources
from megalowrank.data.train_tokenizer import trained_tokenizer
from megalowrank.errors import ConfigError, run_main

_SAMPLE_MB, _SMALLEST = 20.0, 1e-6
_ENDINGS = (".bin", ".idx", ".sizes", ".json", ".model", ".model.json")


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
    text.add_argument("--dataset-split", metavar="NAME", help="its split, or that of a saved one (default: train)")
    text.add_argument("--dataset-revision", metavar="COMMIT", help="commit, tag or branch (default: the newest commit)")
    text.add_argument("--json-keys", nargs="+", metavar="KEY", help="member or column that is the text (default: text)")
    text.add_argument(
        "--sample-by", choices=SAMPLE_BY, help="what a document of plain text is (default: document, a whole file)"
    )
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="sentencepiece file, Hugging Face folder or name")
    tokens.add_argument("--tokenizer-type", metavar="TYPE", help="SentencePieceTokenizer or HuggingFaceTokenizer")
    tokens.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces: OUTPUT_PREFIX.model"
    )
    tokens.add_argument("--tokenizer-sample-mb", type=float, metavar="MB", help="text it is trained on (default: 20)")
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
    keys, split, sample_by = args.json_keys or ["text"], args.dataset_split or "train", args.sample_by or "document"
    if len(keys) != 1:
        raise ConfigError("--json-keys takes one key", " ".join(keys), "one run for each key")
    found: list[Source] = []
    if args.dataset:
        found = [HubDataset.pin(args.dataset, args.dataset_config, split, args.dataset_revision, keys[0])]
    for path in args.input:
        saved = is_saved_dataset(path)
        found += [SavedDataset(path, split, keys[0])] if saved else file_sources(path, keys[0], sample_by)
    _refuse_idle(args, found)
    return found


def _refuse_idle(args: argparse.Namespace, sources: Sequence[Source]) -> None:
    """ConfigError for a flag that says nothing about any of the sources."""
    kinds = {type(source) for source in sources}
    for name, owners, needed in (
        ("dataset_config", {HubDataset}, "--dataset"),
        ("dataset_revision", {HubDataset}, "--dataset"),
        ("dataset_split", {HubDataset, SavedDataset}, "--dataset, or an --input of save_to_disk"),
        ("json_keys", kinds - {PlainText}, "text that has members or columns"),
        ("sample_by", {PlainText}, "plain text"),
    ):
        if getattr(args, name) is not None and not kinds & owners:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without {needed}")


def _check_prefix(prefix: str, sources: Sequence[Source]) -> None:
    """The results have a name, and it is no input's."""
    if Path(f"{prefix}.bin").name == ".bin":
        raise ConfigError("--output-prefix ends with a folder", prefix, "a path and the beginning of a file name")
    results = {os.path.realpath(f"{prefix}{ending}") for ending in _ENDINGS}
    for source in sources:
        path = source.describe().get("path")
        if path is not None and os.path.realpath(path) in results:
            raise ConfigError(f"--output-prefix would overwrite the input {path}", prefix, "another prefix")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``preprocess_data``."""
    args = _parser().parse_args(argv)
    if not args.output_prefix:
        raise ConfigError("--output-prefix is missing", None, "a path without ending")
    for name in ("part_mb", "tokenizer_sample_mb", "log_interval"):
        value = getattr(args, name)
        if value is not None and not _SMALLEST <= value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is out of range", value, f">= {_SMALLEST:g}, finite")
    if (args.tokenizer_model is None) == (args.vocab_size is None):
        raise ConfigError("one of --tokenizer-model and --vocab-size (to train one) is needed")
    if args.tokenizer_sample_mb is not None and args.vocab_size is None:
        raise ConfigError("--tokenizer-sample-mb has no effect without --vocab-size")
    sources, model = sources_of(args), args.tokenizer_model
    _check_prefix(args.output_prefix, sources)
    if model is None:
        model, characters = f"{args.output_prefix}.model", int((args.tokenizer_sample_mb or _SAMPLE_MB) * 1e6)
        with errors_of_files(args.output_prefix):
            trained_tokenizer(sources, model, args.vocab_size, characters, args.overwrite)
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
