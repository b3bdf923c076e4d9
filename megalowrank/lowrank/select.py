"""Which linears are adapted: patterns over logical names such as ``layers.3.attention.q``."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megalowrank.errors import ConfigError


def adapted(projection: str, names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the fused ``projection``, whose logical matrices are ``names``, is adapted.

    A pattern matches a whole name or its last part, with shell wildcards. A fused projection is
    adapted as a whole: its W is one tensor, either frozen or trained. Raises ConfigError if the
    patterns split it.
    """
    chosen = [name for name in names if any(matches(name, pattern) for pattern in patterns)]
    if chosen and len(chosen) != len(names):
        parts = "/".join(name.rsplit(".", 1)[-1] for name in names)
        raise ConfigError(
            f"--lora-target splits the fused projection {projection}",
            f"only {'/'.join(name.rsplit('.', 1)[-1] for name in chosen)}",
            f"all of {parts}, or none",
        )
    return bool(chosen)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names the logical matrix: its whole name, or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that matches none of the model's logical matrices."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ConfigError("--lora-target matches no layer", repr(pattern), f"{known}, or a pattern over full names")
