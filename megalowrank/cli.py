"""Command line from the configuration dataclasses: one flag per field, ``-`` and ``_`` alike, and ``--config FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megalowrank.config import DataConfig, DiagnosticsConfig, ModelConfig, OutputConfig, ParallelConfig, TrainConfig
from megalowrank.errors import ConfigError, nearest, unknown_name
from megalowrank.flags.fields import Flag, flags_of
from megalowrank.flags.file import ConfigFile, read_config
from megalowrank.flags.names import foreign

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "output": OutputConfig,
    "diagnostics": DiagnosticsConfig,
}
METHOD_SECTION = "method_config"
_LONGEST = 200


@dataclass
class RunConfig:
    """Everything the user said. ``given`` are the fields that were typed or stand in the configuration file.

    ``ds_config`` is the path of a DeepSpeed JSON or its content. ``notes`` are lines that the user should see.
    """

    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    data: DataConfig
    output: OutputConfig
    diagnostics: DiagnosticsConfig
    method_config: Any
    ds_config: str | dict[str, Any] | None
    given: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def sections(self) -> dict[str, Any]:
        """The dataclasses by name, in the order of ``--help``."""
        return {name: getattr(self, name) for name in SECTIONS} | {METHOD_SECTION: self.method_config}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigError: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(_short(message.replace("argument --", "--")))


def parse(argv: Sequence[str], method_configs: Mapping[str, type], program: str) -> RunConfig:
    """Parse flags and the file of ``--config``; what is typed wins over the file, the file over defaults.

    ``method_configs`` has the config class of every method, of which one is chosen. Raises ConfigError for unknown
    flags and keys, bad values and values out of range.
    """
    words = [_dashes(word) for word in argv]
    early = _early(words)
    file = read_config(early.config[0], (*SECTIONS, METHOD_SECTION)) if early.config else ConfigFile()
    method = early.method or file.method or TrainConfig.method
    if method not in method_configs:
        raise unknown_name("--method is unknown", _short(method), method_configs)
    classes = {**SECTIONS, METHOD_SECTION: method_configs[method]}
    parser = build_parser(classes, program, method)
    parser.epilog = f"methods: {', '.join(method_configs)}"
    known, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(unknown[0], parser, method, method_configs)
    replaced = file.method is not None and file.method != method
    values = {"ds_config": file.deepspeed, **file.values(classes, method_configs, replaced), **vars(known)}
    if values.get("finetune") and vars(known).get("load") == "auto" and "finetune" not in vars(known):
        values["finetune"] = False
        file.notes.append("--load auto resumes; the weights that finetune of the file names are not read again")
    ds_config = values.pop("ds_config")
    built = {
        name: cls(**{flag.name: values[flag.name] for flag in flags_of(cls) if flag.name in values})
        for name, cls in classes.items()
    }
    for name, section in built.items():
        if name != "model":
            section.check()
    _check_profile(built["diagnostics"], built["train"])
    given = {flag.name for cls in classes.values() for flag in flags_of(cls) if flag.name in values}
    return RunConfig(**built, ds_config=ds_config, given=given, notes=file.notes)


def _check_profile(diagnostics: DiagnosticsConfig, train: TrainConfig) -> None:
    profiled = diagnostics.profiled()
    if profiled is not None and train.epochs is None and profiled.start >= train.train_iters:
        allowed = f"updates below --train-iters {train.train_iters}"
        raise ConfigError("--profile-steps begins after the last update", diagnostics.profile_steps, allowed)


def build_parser(classes: Mapping[str, type], program: str, method: str) -> argparse.ArgumentParser:
    """A parser with one group per dataclass; flags that are not typed stay absent from the result."""
    parser = _Parser(prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", type=_text, help="YAML or JSON with any of these flags, or an earlier run.json"
    )
    parser.add_argument(
        "--ds-config", "--deepspeed-config", metavar="FILE", type=_text, help="DeepSpeed configuration (JSON)"
    )
    parser.add_argument("--deepspeed", action="store_true", help="accepted: DeepSpeed is always used")
    parser.add_argument("--local-rank", type=int, help="set by the launcher")
    for name, cls in classes.items():
        title = f"method {method}" if name == METHOD_SECTION else name
        group = parser.add_argument_group(title, (cls.__doc__ or "").split("\n")[0])
        for item in flags_of(cls):
            _add_flag(group, item)
    return parser


def _add_flag(group: Any, item: Flag) -> None:
    unit = f" [{item.unit}]" if item.unit else ""
    shown = "" if item.default is None else f" (default: {item.shown_default})"
    options: dict[str, Any] = {"dest": item.name, "help": (item.help + unit + shown).replace("%", "%%")}
    if item.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _text if item.kind in (str, list) else item.kind
        options["metavar"] = item.name.rsplit("_", 1)[-1].upper()
    if item.choices:
        options["choices"] = item.choices
        options.pop("metavar")
    if item.nargs:
        options["nargs"] = item.nargs
    group.add_argument(item.option, **options)


def _text(word: str) -> str:
    """A word of an unset shell variable would count as not given."""
    if not word.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return word


def _dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _early(words: list[str]) -> argparse.Namespace:
    """``--method`` and ``--config``, on which the other flags depend."""
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--method")
    finder.add_argument("--config", action="append", type=_text, default=[])
    found = finder.parse_known_args(words)[0]
    if len(found.config) > 1:
        raise ConfigError("--config is given twice", None, "one file")
    return found


def _refuse(word: str, parser: argparse.ArgumentParser, method: str, methods: Mapping[str, type]) -> NoReturn:
    name = word.partition("=")[0]
    if not name.startswith("--"):
        raise ConfigError("unexpected argument", _short(repr(word)), "flags and their values")
    plain = name[2:].replace("-", "_").removeprefix("no_")
    owners = [m for m, cls in methods.items() if plain in {flag.name for flag in flags_of(cls)}]
    if owners and method not in owners:
        raise ConfigError(f"{name} does not belong to --method {method}", None, f"with --method {' or '.join(owners)}")
    entry = foreign(name)
    if entry is not None:
        raise ConfigError(entry.answer)
    flags = [option for action in parser._actions for option in action.option_strings]
    hint = nearest(name, flags)
    raise ConfigError(f"unknown flag {_short(name)}, " + (f"did you mean {hint}?" if hint else "see --help"))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
