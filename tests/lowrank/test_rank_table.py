"""The file of --lora-config: what it says of every matrix, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.rank_table import rank_table, table_text

LAYERED = """granularity = "layer"
[default]
enabled = false
[layers.0.q]
rank = 4
alpha = 2
[layers.11.down]
enabled = true
[layers.2.v]
rank = 2
"""
NETWORK = """[all_layers.q]
rank = 3
[all_layers.up]
enabled = false
"""
SPEC = LowRankSpec(8, 2.0)
NAMES = [
    "layers.0.attention.q",
    "layers.11.mlp.down",
    "layers.2.attention.v",
    "layers.1.attention.q",
    "layers.0.mlp.up",
]


def found(text: str, spec: LowRankSpec = SPEC) -> list[tuple[int, float] | None]:
    table = rank_table(text)
    assert table is not None
    specs = [table.spec_of(name, spec) for name in NAMES]
    return [None if spec is None else (spec.rank, spec.scale) for spec in specs]


def test_entries_defaults_and_flags() -> None:
    """alpha is that of the flags, 16, where a file gives a rank alone."""
    assert found(LAYERED) == [(4, 0.5), (8, 2.0), (2, 8.0), None, None]
    assert found(NETWORK) == [(3, 16 / 3), (8, 2.0), (8, 2.0), (3, 16 / 3), None]
    assert found(NETWORK, LowRankSpec(8, 0.5, projector=True))[0] == (3, 0.5), "a projector has a scale, no alpha"


@pytest.mark.parametrize("text", [LAYERED, NETWORK, "[default]\nrank = 5\n"])
def test_a_file_and_its_text_are_the_same(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.toml"
    path.write_text(text)
    kept = table_text(str(path))
    assert kept is not None and found(kept) == found(text) and table_text(kept) == kept
    assert rank_table(None) is None and table_text(None) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("granularity = 'head'\n", "granularity is unknown"),
        ("[default]\nranks = 3\n", "did you mean rank"),
        ("[default]\nrank = 0\n", "rank"),
        ("[default]\nrank = true\n", "rank"),
        ("[default]\nrank = 1.5\n", "rank"),
        ("[default]\nalpha = inf\n", "alpha"),
        ("[default]\nenabled = 1\n", "true or false"),
        ("[layers.0.q]\nrank = 3\n", "an unknown table; got layers"),
        ("granularity = 'layer'\n[layers.q]\nrank = 3\n", "not a table"),
        ("[all_layers]\nq = 3\n", "not a table"),
        ("[default\nrank = 3\n", "not TOML"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_table(text)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_and_entries_of_no_matrix() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        rank_table("nowhere.toml")
    table = rank_table(LAYERED)
    assert table is not None
    table.check(NAMES, NAMES)
    with pytest.raises(ConfigError, match=r"11\.down"):
        table.check(NAMES[:1], NAMES)


def test_an_entry_that_is_on_for_what_is_not_adapted() -> None:
    table = rank_table("[all_layers.q]\nrank=2\n[all_layers.down]\nenabled=false\n")
    assert table is not None
    table.check(NAMES, [name for name in NAMES if name.endswith("q")])
    with pytest.raises(ConfigError, match="what --lora-target leaves out; got q"):
        table.check(NAMES, [name for name in NAMES if not name.endswith("q")])
