"""What a run will need, before it starts: parameters, memory, bytes on the wire, pipeline bubble and FLOPs.

    python tools/estimate.py --preset llama_1b --method switchlora --lora-rank 512 --bf16 --zero 1 \
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --data-parallel-size 16 \
      --seq-length 2048 --micro-batch-size 4 --global-batch-size 1024

All flags of the training programs are taken, also from --config FILE (an earlier run.json, for instance), and
--ds-config as well; data and output do not matter. Nothing is built and nothing is started: it is arithmetic.
The table is that of a run's start; its sum is an upper bound, since not all categories peak together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.cli import RunConfig, parse
from megalowrank.config import at_least
from megalowrank.engine import dsconfig
from megalowrank.engine.layouts import check_layout
from megalowrank.engine.plan import layout_of, reads_of
from megalowrank.errors import ConfigError, run_main
from megalowrank.methods import METHODS
from megalowrank.models.accounting.estimate import Estimate, estimate
from megalowrank.models.accounting.table import startup_table, summary
from megalowrank.models.architecture import FAMILIES, check_tensor_parallel
from megalowrank.models.presets import apply_preset


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument --", "--"))


def own_parser() -> Parser:
    """The flags that only a plan has."""
    parser = Parser(
        prog="estimate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("--data-parallel-size", type=int, default=1, metavar="RANKS", help="default: 1")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage, instead of --ds-config; default: 0")
    parser.add_argument("--offload-optimizer", action="store_true", help="optimizer state in host memory (with --zero)")
    parser.add_argument("--offload-param", action="store_true", help="parameters in host memory (with --zero 3)")
    parser.add_argument("--cpu", action="store_true", help="a run on the CPU, where norms keep more")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, elements and FLOPs as numbers")
    return parser


def deepspeed_of(args: argparse.Namespace, config: RunConfig) -> Any:
    """The DeepSpeed configuration that was named, or the one that the flags of the plan describe."""
    if config.ds_config is not None:
        if args.zero is not None or args.offload_optimizer or args.offload_param:
            raise ConfigError("--zero, --offload-optimizer and --offload-param contradict --ds-config")
        return config.ds_config
    zero: dict[str, Any] = {"stage": args.zero or 0}
    for block, asked in (("offload_optimizer", args.offload_optimizer), ("offload_param", args.offload_param)):
        if asked:
            zero[block] = {"device": "cpu"}
    return {"zero_optimization": zero}


def planned(argv: Sequence[str]) -> tuple[Estimate, argparse.Namespace]:
    """The estimate that a command line asks for. Raises ConfigError as the training programs do."""
    args, rest = own_parser().parse_known_args([_dashes(word) for word in argv])
    at_least("data-parallel-size", args.data_parallel_size, 1)
    config = parse(rest, {name: method.config_class for name, method in METHODS.items()}, "estimate.py")
    train = config.train if config.train.lr is not None else replace(config.train, lr=1e-3)
    model = apply_preset(config.model, None, train.seq_length, FAMILIES)
    asked = deepspeed_of(args, config)
    given = config.given - ({"lr"} if config.train.lr is None else set())
    method = METHODS[train.method](config.method_config)
    heads = method.replica_groups()
    ranks = heads * args.data_parallel_size
    resolved = dsconfig.resolve(asked, train, given, ranks, model.hidden_size or 0, heads)
    check_layout(config.parallel, model, resolved.train, resolved.deepspeed["zero_optimization"])
    check_tensor_parallel(model, config.parallel.tensor_model_parallel_size)
    layout = layout_of(model, config.parallel, resolved, method, args.data_parallel_size, not args.cpu)
    plans = reads_of(method), method.between_heads, method.refresh_plan()
    return estimate(model, method.adapters(), layout, *plans), args


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def main() -> None:
    """Command line of ``estimate``."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(own_parser().format_help())
    found, args = planned(sys.argv[1:])
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        layout = found.layout
        ranks = f"tensor {layout.tensor_size} x pipeline {layout.pipe_size} x data {layout.data_size}"
        batch = f"{layout.accumulation} micro-batch(es) of {layout.micro_batch} sample(s)"
        print(startup_table(found))
        print(f"\n{layout.world} rank(s): {ranks}; {found.tokens:,} tokens per update in {batch}")
        print("\n".join(summary(found)))


if __name__ == "__main__":
    run_main(main)
