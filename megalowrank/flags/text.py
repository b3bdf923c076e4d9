"""YAML and JSON as plain dictionaries: safe, bounded, without duplicate keys or surprises of YAML 1.1."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from megalowrank.errors import ConfigError

_LARGEST = 64 * 1024
_DEEPEST = 16
_LONGEST = 100
_LONGEST_PATH = 120
_TAG = "tag:yaml.org,2002:"


def read_mapping(path: str) -> dict[str, Any]:
    """The object in a JSON file (``*.json``) or YAML file (any other name), nothing but its syntax checked.

    Raises ConfigError, naming the file: unreadable, over 64 KiB, not text, bad syntax, duplicate keys, keys that
    are no text, nesting over 16 levels, YAML tags or aliases, NaN and infinity in JSON, anything but one object.
    """
    name = f"--config {shown_path(path)}"
    text = _read(path, name)
    parse = _parse_json if path.lower().endswith(".json") else _parse_yaml
    try:
        found = parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name}{place} is not usable YAML", _one_line(problem)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid", _one_line(str(error))) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} does not hold settings", shown(found), "keys and their values")
    return found


def shown(value: Any) -> str:
    """A value of a file on one short line."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge number"
    return _one_line(json.dumps(value))


def shown_path(path: str) -> str:
    """A path on one line; of a very long one the end, which tells files apart."""
    line = path if path.isprintable() else ascii(path)
    return line if len(line) <= _LONGEST_PATH else "..." + line[-_LONGEST_PATH:]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def _read(path: str, name: str) -> str:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ConfigError(f"{name} is not a file")
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read: {getattr(error, 'strerror', None) or 'bad name'}") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"{name} is too long for a configuration", None, f"up to {_LARGEST // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not text in UTF-8") from None


def _parse_json(text: str) -> Any:
    found = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    _check_depth(found, 1)
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _check_depth(value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2: 1e-4 is a number, ``no`` and 012 are what they look like."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem="tags (!name) are not supported", problem_mark=event.start_mark)
        if self.depth == _DEEPEST:
            problem = f"it is nested deeper than {_DEEPEST} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        keys = set()
        for inner, _ in node.value:
            key = self.construct_object(inner, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem="a key is not a name", problem_mark=inner.start_mark)
            if key in keys:
                problem = f"the key {shown(key)} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=inner.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = node.value.lower()
        return int(text) if node.tag == _TAG + "int" else float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
):  # fmt: skip
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_number)


def _parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
