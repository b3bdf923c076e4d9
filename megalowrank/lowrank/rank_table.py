"""Rank, scale and on/off of single matrices: the file of ``--lora-config``.

```toml
granularity = "layer"    # or "network": one entry for a matrix of all blocks
[default]                # of every matrix without an entry; without this table the flags hold for it
enabled = false
[all_layers.q]           # "network": rank r, alpha (the scale is alpha / r)
rank = 8
alpha = 16.0
[layers.3.q]             # "layer"; it may leave rank and alpha to the flags
enabled = true
```

A matrix is called as in ``--lora-target``: q, k, v, o, gate, up, down, and residual_1, residual_2, cross_in, cross_cut
where there are shortcuts. A matrix that is not enabled stays frozen, without factors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalowrank.errors import ConfigError, unknown_name
from megalowrank.lowrank.factors import LowRankSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_GRANULARITIES = {"network": "all_layers", "layer": "layers"}
_KEYS = {"enabled": bool, "rank": int, "alpha": float}


@dataclass(frozen=True)
class Entry:
    """What a file says of a matrix; None: what the flags say."""

    enabled: bool = True
    rank: int | None = None
    alpha: float | None = None

    def applied(self, spec: LowRankSpec) -> LowRankSpec | None:
        """``spec`` with what is said here; None if the matrix has no factors."""
        if not self.enabled:
            return None
        rank = self.rank or spec.rank
        if spec.projector:
            return replace(spec, rank=rank)
        alpha = spec.scale * spec.rank if self.alpha is None else self.alpha
        return replace(spec, rank=rank, scale=alpha / rank)

    def lines(self) -> list[str]:
        """As TOML."""
        found = [f"enabled = {str(self.enabled).lower()}"]
        found += [] if self.rank is None else [f"rank = {self.rank}"]
        return found + ([] if self.alpha is None else [f"alpha = {self.alpha!r}"])


@dataclass(frozen=True)
class RankTable:
    """Entries by matrix: ``q`` for all blocks, ``3.q`` for block 3; ``default`` for all others."""

    default: Entry
    entries: Mapping[str, Entry]
    layered: bool = True

    def spec_of(self, name: str, spec: LowRankSpec) -> LowRankSpec | None:
        """What the matrix called ``name`` (layers.3.attention.q) gets where the flags say ``spec``."""
        return self.entries.get(self._key(name), self.default).applied(spec)

    @property
    def has_alpha(self) -> bool:
        """Whether any entry has an alpha."""
        return any(entry.alpha is not None for entry in (self.default, *self.entries.values()))

    def check(self, names: Sequence[str], adapted: Sequence[str]) -> None:
        """Raise ConfigError for an entry that is about none of the matrices of the model, or is on but has no effect
        since none of its matrices is one of the ``adapted`` ones."""
        known = dict.fromkeys(self._key(name) for name in names)
        reached = {self._key(name) for name in adapted}
        for key, entry in self.entries.items():
            if key not in known:
                raise unknown_name("--lora-config has an entry for a matrix that the model lacks", key, known)
            if entry.enabled and key not in reached:
                raise ConfigError("--lora-config has an entry that is on for what --lora-target leaves out", key)

    def text(self) -> str:
        """The file, for people and for ``run.json``."""
        blocks = [[f'granularity = "{"layer" if self.layered else "network"}"']]
        blocks.append(["[default]", *self.default.lines()])
        table = "layers" if self.layered else "all_layers"
        blocks += [[f"[{table}.{key}]", *entry.lines()] for key, entry in self.entries.items()]
        return "\n\n".join("\n".join(block) for block in blocks) + "\n"

    def _key(self, name: str) -> str:
        parts = name.split(".")
        return f"{parts[1]}.{parts[-1]}" if self.layered else parts[-1]


def table_text(source: str | None) -> str | None:
    """``source`` as the text that ``rank_table`` reads, in one order; see there."""
    table = rank_table(source)
    return None if table is None else table.text()


def rank_table(source: str | None) -> RankTable | None:
    """The table of a file, or of the text of one (it has several lines); None for None.

    Raises ConfigError, with file and key, for what is not one.
    """
    if source is None:
        return None
    where = "--lora-config" if "\n" in source else f"--lora-config {source}"
    try:
        data = tomllib.loads(source if "\n" in source else Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(where, error.strerror, "a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not TOML", str(error)) from None
    return _table(where, data)


def _table(where: str, data: dict[str, Any]) -> RankTable:
    kind = data.pop("granularity", "network")
    if kind not in _GRANULARITIES:
        raise ConfigError(f"{where}: granularity is unknown", repr(kind), " or ".join(_GRANULARITIES))
    default = _entry(f"{where} [default]", data.pop("default", {}))
    matrices = data.pop(_GRANULARITIES[kind], {})
    for key in data:
        raise ConfigError(f"{where}: an unknown table", key, f"granularity, default, {_GRANULARITIES[kind]}")
    entries: dict[str, Entry] = {}
    for key, value in _pairs(where, matrices, kind == "layer"):
        entries[key] = _entry(f"{where} [{_GRANULARITIES[kind]}.{key}]", value)
    return RankTable(default, entries, kind == "layer")


def _pairs(where: str, matrices: Any, layered: bool) -> Iterable[tuple[str, Any]]:
    tables = matrices if layered else {"": matrices}
    if not isinstance(matrices, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{where}: matrices are not tables", None, "[layers.3.q], or [all_layers.q]")
    for number, table in tables.items():
        for name, value in table.items():
            yield (f"{number}.{name}" if layered else name), value


def _entry(where: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a table", repr(value))
    for key, found in value.items():
        if key not in _KEYS:
            raise unknown_name(f"{where}: an unknown key", key, _KEYS)
        if not _fits(found, _KEYS[key]):
            allowed = "true or false" if _KEYS[key] is bool else "a number above 0"
            raise ConfigError(f"{where}: {key}", repr(found), allowed)
    return Entry(**value)


def _fits(found: Any, wanted: type) -> bool:
    """Whether a value of a file is of the kind ``wanted``, numbers above 0."""
    if wanted is bool or isinstance(found, bool):
        return wanted is bool and isinstance(found, bool)
    return isinstance(found, (int, float) if wanted is float else int) and 0 < found < math.inf
