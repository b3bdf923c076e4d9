"""A checkpoint as a Hugging Face model, and the other way round: LLaMA, GPT-2, GPT-NeoX and OPT.

    python tools/convert_hf.py to-hf runs/quickstart/checkpoints OUT
    python tools/convert_hf.py to-hf runs/quickstart/checkpoints OUT --adapters
    python tools/convert_hf.py from-hf FOLDER OUT
    python tools/convert_hf.py from-hf FOLDER OUT --adapters ADAPTER

to-hf merges s·B·A into W in float32; with --adapters it writes OUT/base and a PEFT adapter OUT/adapter instead. from-hf
writes a checkpoint of weights alone: start any method from it with --load OUT --finetune. That merges an adapter into W
and puts new factors on. Either way transformers loads the model, and its logits must be those of ours: the largest
difference is printed, and if it is more than rounding nothing is written and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
from megalowrank.checkpoint.hf.convert import Export, from_hf, to_hf
from megalowrank.checkpoint.hf.export import DTYPES
from megalowrank.errors import run_main
from megalowrank.parallel.groups import initialize_single_process


def parser() -> argparse.ArgumentParser:
    """The two commands and their flags."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="write a Hugging Face folder from a checkpoint")
    out.add_argument("checkpoint", type=Path, help="folder of checkpoints (the newest is taken), or one checkpoint")
    out.add_argument("out", type=Path, help="folder to write; it must not exist")
    out.add_argument("--max-shard-size", default=Export.max_shard_size, help="of one file of weights, like 500MB")
    out.add_argument("--dtype", default=Export.dtype, choices=tuple(DTYPES), help="of the weights in the files")
    out.add_argument("--tokenizer-model", help="sentencepiece model or Hugging Face folder; default: the run's")
    out.add_argument("--adapters", action="store_true", help="base and PEFT adapter instead of merged weights")
    out.add_argument(
        "--without-shortcuts",
        action="store_true",
        help="leave shortcuts of heterolora out: another function than the trained one",
    )
    back = commands.add_parser("from-hf", help="write a checkpoint from a Hugging Face folder")
    back.add_argument("folder", type=Path, help="folder of save_pretrained, with safetensors")
    back.add_argument("out", type=Path, help="folder of checkpoints to write; it must not exist")
    back.add_argument("--adapters", type=Path, metavar="ADAPTER", help="PEFT folder whose factors are kept beside W")
    return found


def main() -> None:
    """Command line of ``convert_hf``."""
    args = parser().parse_args()
    warnings.filterwarnings("ignore", module="transformers")  # about its next version
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))
        if args.command == "to-hf":
            export = Export(
                args.max_shard_size, args.dtype, args.tokenizer_model, args.adapters, args.without_shortcuts
            )
            to_hf(args.checkpoint, args.out, export, print)
        else:
            from_hf(args.folder, args.out, args.adapters, print)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_main(main)
