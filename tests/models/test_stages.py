"""The cut of a model into pipeline stages against all cuts there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.flops import flops_per_token
from megalowrank.models.presets import apply_preset
from megalowrank.models.stages import split_evenly, split_layers, stage_costs

Ranges = list[tuple[int, int]]
SMALL = ModelConfig(num_layers=6, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, vocab_size=90)


def all_cuts(count: int, parts: int) -> list[Ranges]:
    """Every way to cut ``count`` elements into ``parts`` ranges, none of them empty."""
    return [list(zip((0, *inner), (*inner, count), strict=True)) for inner in combinations(range(1, count), parts - 1)]


def dearest(costs: Sequence[float], ranges: Ranges) -> float:
    return max(sum(costs[first:stop]) for first, stop in ranges)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 8])
def test_no_cut_has_a_cheaper_dearest_part(parts: int) -> None:
    source = random.Random(parts)
    for trial in range(40):
        costs = [float(source.choice([1, 2, 3, 9, 50]) if trial % 2 else 5) for _ in range(8)]
        costs[-1] += source.choice([0, 3, 40])
        found = split_evenly(costs, parts)
        assert found in all_cuts(len(costs), parts)
        assert dearest(costs, found) == min(dearest(costs, cut) for cut in all_cuts(len(costs), parts))


def test_equal_blocks_are_dealt_out_evenly_and_late() -> None:
    assert split_evenly([1.0] * 8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert split_evenly([1.0] * 7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert split_evenly([1.0] * 5, 5) == [(i, i + 1) for i in range(5)]


def test_the_head_and_the_kind_of_block_weigh() -> None:
    """A vocabulary as dear as a block and a half takes blocks from the last stage, adapted blocks weigh less."""
    config = apply_preset(replace(SMALL, vocab_size=1), None)
    block = stage_costs(config, None)[0]
    config.vocab_size = round(1.5 * block / (6 * 32))
    assert split_layers(config, None, 2) == [(0, 4), (4, 6)]
    some = Adapters(LowRankSpec(2, 1.0), ("layers.0.*", "layers.1.*", "layers.2.*"))
    costs = stage_costs(config, some)
    assert costs[0] == costs[2] < 0.8 * costs[3] and costs[3] == costs[4] < costs[5]
    best = min(dearest(costs, cut) for cut in all_cuts(6, 3))
    assert dearest(costs, split_layers(config, some, 3)) == best


@pytest.mark.parametrize("recompute", [False, True])
def test_costs_add_up_to_the_model(recompute: bool) -> None:
    config = apply_preset(SMALL, None)
    adapters = Adapters(LowRankSpec(3, 1.0), ("*",))
    assert sum(stage_costs(config, adapters, 20, recompute)) == flops_per_token(config, adapters, 20, recompute)


def test_a_large_model_and_too_many_stages() -> None:
    config = apply_preset(ModelConfig(preset="llama_7b"), None)
    found = split_layers(config, None, 8)
    assert [stop - first for first, stop in found] == [4] * 8
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-size"):
        split_layers(config, None, 33)
