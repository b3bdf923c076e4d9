"""Names of the tensors that every head of a run has for itself: ``head0/``, ``head1/``, … and the name of one head."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHARED = ("weight/", "residual/")
_NAME = re.compile(r"(head\d+/)?(.*)")


def head_prefix(head: int) -> str:
    """How the names of a head's own tensors begin where there are several heads."""
    return f"head{head}/"


def without_head(name: str) -> str:
    """``name`` as a run with one head has it."""
    match = _NAME.fullmatch(name)
    return name if match is None else match[2]


def head_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of all heads of a checkpoint with these tensors, by head; an empty one where there is one head."""
    found = {name[: len(name) - len(without_head(name))] for name in names} - {""}
    return [head_prefix(head) for head in range(len(found))] or [""]
