"""Which linears a pattern names."""

from __future__ import annotations

import pytest

from megalowrank.errors import ConfigError
from megalowrank.lowrank.select import adapted, check_patterns, matches

QKV = ["layers.3.attention.q", "layers.3.attention.k", "layers.3.attention.v"]
NAMES = [*QKV, "layers.3.attention.o", "layers.3.mlp.gate", "layers.3.mlp.up", "layers.3.mlp.down"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("q", ["q"]), ("attention.q", []), ("*.q", ["q"]), ("layers.3.*", ["q", "k", "v", "o", "gate", "up", "down"]),
     ("layers.4.*", []), ("[qkv]", ["q", "k", "v"]), ("*", ["q", "k", "v", "o", "gate", "up", "down"]), ("Q", []),
     ("layers.?.mlp.*", ["gate", "up", "down"]), ("", []), ("layers.3.attention.o", ["o"]), ("d*n", ["down"])],
)  # fmt: skip
def test_a_pattern_matches_the_whole_name_or_its_last_part(pattern: str, expected: list[str]) -> None:
    assert [name.rsplit(".", 1)[-1] for name in NAMES if matches(name, pattern)] == expected


def test_a_fused_projection_is_adapted_as_a_whole() -> None:
    assert adapted("attention.qkv", QKV, ["q", "k", "v"])
    assert adapted("attention.qkv", QKV, ["*.attention.*"])
    assert not adapted("attention.qkv", QKV, ["o", "down"])
    assert not adapted("attention.qkv", QKV, [])


@pytest.mark.parametrize(("patterns", "given"), [(["q"], "q"), (["q", "v"], "q/v"), (["layers.3.attention.k"], "k")])
def test_patterns_that_split_a_projection_are_refused(patterns: list[str], given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted("attention.qkv", QKV, patterns)
    message = str(caught.value)
    assert (
        "--lora-target" in message and "attention.qkv" in message and f"only {given}" in message and "q/k/v" in message
    )


def test_patterns_that_match_nothing_are_refused_by_name() -> None:
    check_patterns(["q", "*.down", "layers.3.*"], NAMES)
    with pytest.raises(ConfigError) as caught:
        check_patterns(["q", "w_query"], NAMES)
    assert "--lora-target" in str(caught.value) and "w_query" in str(caught.value) and "gate" in str(caught.value)
    with pytest.raises(ConfigError):
        check_patterns(["layers.4.*"], NAMES)
