"""What a configuration dataclass says about its flags: read by the parser, the file reader and the documentation."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One field of a configuration dataclass. ``kind`` is bool, int, float, str or list (of words)."""

    name: str
    kind: type
    default: Any
    optional: bool
    help: str
    unit: str
    choices: tuple
    nargs: str | None

    @property
    def option(self) -> str:
        """As it is typed: ``--lora-rank``."""
        return "--" + self.name.replace("_", "-")

    @property
    def shown_default(self) -> str:
        """The default as a user would type it; empty if there is none."""
        if self.default is None:
            return ""
        return " ".join(map(str, self.default)) if isinstance(self.default, list) else str(self.default)


@cache
def flags_of(cls: type) -> tuple[Flag, ...]:
    """The flags of a configuration dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return tuple(_flag(item, hints[item.name]) for item in dataclasses.fields(cls))


def _flag(item: dataclasses.Field, hint: Any) -> Flag:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kind = next(option for option in options if option is not types.NoneType)
    default = item.default_factory() if callable(item.default_factory) else item.default
    data = item.metadata
    return Flag(
        name=item.name,
        kind=typing.get_origin(kind) or kind,
        default=default,
        optional=types.NoneType in options,
        help=data["help"],
        unit=data["unit"],
        choices=tuple(data["choices"]),
        nargs=data["nargs"],
    )
