"""Command line from the configuration dataclasses: one flag per field, ``-`` and ``_`` alike."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megalowrank.config import DataConfig, ModelConfig, OutputConfig, ParallelConfig, TrainConfig
from megalowrank.errors import ConfigError, nearest, unknown_name

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "output": OutputConfig,
}


@dataclass
class RunConfig:
    """Everything the user said. ``given`` are the fields typed on the command line."""

    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    data: DataConfig
    output: OutputConfig
    method_config: Any
    ds_config: str | None
    given: set[str] = field(default_factory=set)

    def sections(self) -> dict[str, Any]:
        """The dataclasses by name, in the order of ``--help``."""
        return {name: getattr(self, name) for name in SECTIONS} | {"method_config": self.method_config}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument --", "--"))


def parse(argv: Sequence[str], method_configs: dict[str, type], program: str) -> RunConfig:
    """Parse flags; ``method_configs`` has the config class of every method, of which one is chosen.

    Raises ConfigError for unknown flags, bad values and values out of range.
    """
    words = [_dashes(word) for word in argv]
    method = _chosen_method(words, method_configs)
    classes = {**SECTIONS, "method_config": method_configs[method]}
    parser = build_parser(classes, program, method)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(unknown[0], parser, method, method_configs)
    values = vars(known)
    built = {
        name: cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
        for name, cls in classes.items()
    }
    for name, section in built.items():
        if name != "model":
            section.check()
    return RunConfig(**built, ds_config=values.get("ds_config"), given=set(values))


def build_parser(classes: dict[str, type], program: str, method: str) -> argparse.ArgumentParser:
    """A parser with one group per dataclass; flags that are not typed stay absent from the result."""
    parser = _Parser(prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--ds-config", "--deepspeed-config", metavar="FILE", help="DeepSpeed configuration (JSON)")
    parser.add_argument("--deepspeed", action="store_true", help="accepted: DeepSpeed is always used")
    parser.add_argument("--local-rank", type=int, help="set by the launcher")
    for name, cls in classes.items():
        title = f"method {method}" if name == "method_config" else name
        group = parser.add_argument_group(title, (cls.__doc__ or "").split("\n")[0])
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            _add_flag(group, item, hints[item.name])
    return parser


def _add_flag(group: Any, item: dataclasses.Field, hint: Any) -> None:
    kind = next((t for t in typing.get_args(hint) if t is not types.NoneType), hint)
    default = item.default_factory() if callable(item.default_factory) else item.default
    unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
    shown = "" if default is None else f" (default: {' '.join(default) if isinstance(default, list) else default})"
    options: dict[str, Any] = {"dest": item.name, "help": (item.metadata["help"] + unit + shown).replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = str if kind is list else kind
        options["metavar"] = item.name.rsplit("_", 1)[-1].upper()
    if item.metadata["choices"]:
        options["choices"] = item.metadata["choices"]
        options.pop("metavar")
    if item.metadata["nargs"]:
        options["nargs"] = item.metadata["nargs"]
    group.add_argument("--" + item.name.replace("_", "-"), **options)


def _dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _chosen_method(words: list[str], method_configs: dict[str, type]) -> str:
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--method", default=TrainConfig.method)
    method = finder.parse_known_args(words)[0].method
    if method not in method_configs:
        raise unknown_name("--method is unknown", method, method_configs)
    return method


def _refuse(word: str, parser: argparse.ArgumentParser, method: str, method_configs: dict[str, type]) -> NoReturn:
    name = word.partition("=")[0]
    if not name.startswith("--"):
        raise ConfigError("unexpected argument", repr(word), "flags and their values")
    plain = name[2:].replace("-", "_").removeprefix("no_")
    owners = [m for m, cls in method_configs.items() if plain in {f.name for f in dataclasses.fields(cls)}]
    if owners and method not in owners:
        raise ConfigError(f"{name} does not belong to --method {method}", None, f"with --method {' or '.join(owners)}")
    flags = [option for action in parser._actions for option in action.option_strings]
    hint = nearest(name, flags)
    raise ConfigError(f"unknown flag {name}, " + (f"did you mean {hint}?" if hint else "see --help"))
