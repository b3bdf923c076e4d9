"""FLOPs of ranks, the bubble against a simulated 1F1B pipeline, and the choice between ride and partial."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.flops import flops_per_token
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.pipeline import pipeline_of, rank_flops
from megalowrank.models.accounting.schedules import CALL_BYTES, OPERATIONS_PER_BYTE, choose_schedules
from megalowrank.models.accounting.wire import wire_bytes
from megalowrank.models.presets import apply_preset
from megalowrank.models.projections import projections

CONFIG = apply_preset(ModelConfig(preset="llama_350m"), None)
ADAPTERS = Adapters(LowRankSpec(64, 1.0), ("*",))
SOME = Adapters(LowRankSpec(64, 1.0), ("layers.1?.attention.*", "down"))


def simulated(costs: list[float], count: int) -> float:
    """Time of ``count`` micro-batches in 1F1B order: a third of a stage's cost forward, the rest backward."""
    stages = len(costs)
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, count)
        order = [("F", i) for i in range(ahead)]
        for i in range(count - ahead):
            order += [("F", ahead + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(count - ahead, count)])
    done: dict[tuple[str, int, int], float] = {}
    clock, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                kind, i = orders[stage][places[stage]]
                other = stage - 1 if kind == "F" else stage + 1
                if 0 <= other < stages and (kind, i, other) not in done:
                    break
                ready = max(clock[stage], done.get((kind, i, other), 0.0))
                clock[stage] = done[kind, i, stage] = ready + costs[stage] * (1 if kind == "F" else 2) / 3
                places[stage] += 1
    return max(clock)


@pytest.mark.parametrize("adapters", [None, ADAPTERS, SOME])
@pytest.mark.parametrize("recompute", [False, True])
def test_ranks_share_the_flops_of_the_model(adapters: Adapters | None, recompute: bool) -> None:
    layout = Layout(1, True, micro_batch=2, seq_length=512, accumulation=3, recompute=recompute)
    whole = flops_per_token(CONFIG, adapters, 512, recompute) * 2 * 512 * 3
    assert rank_flops(CONFIG, adapters, layout) == whole
    assert sum(pipeline_of(CONFIG, adapters, replace(layout, pipe_size=4)).flops) == pytest.approx(whole, rel=1e-12)
    split = replace(layout, tensor_size=2, sequence=True)
    down = 2.0 * 2736 * 1024 * 24 * 3072 * recompute * (adapters is None)
    assert 2 * rank_flops(CONFIG, adapters, split) == pytest.approx(whole + down, rel=1e-12)
    repeated = rank_flops(CONFIG, adapters, replace(split, schedules=dict.fromkeys(projections(CONFIG), "partial")))
    assert repeated == rank_flops(CONFIG, adapters, replace(split, sequence=False))
    assert (repeated > rank_flops(CONFIG, adapters, split)) == (adapters is not None)


@pytest.mark.parametrize("count", [1, 4, 9, 32])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_bubble_of_equal_stages(stages: int, count: int) -> None:
    config = replace(CONFIG, vocab_size=1, num_layers=24)
    layout = Layout(1, True, pipe_size=stages, micro_batch=1, seq_length=512, accumulation=count)
    found = pipeline_of(config, ADAPTERS, layout)
    assert found.bubble == pytest.approx((stages - 1) / count, rel=1e-4)
    assert found.idle == pytest.approx([found.bubble / (1 + found.bubble)] * stages, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [1, 32100, 250000])
@pytest.mark.parametrize("stages", [2, 3, 5, 8])
def test_bubble_is_that_of_a_simulated_pipeline(stages: int, vocabulary: int) -> None:
    """Within 5 %: with stages of other costs a slow one can hold up those before it."""
    config = replace(CONFIG, vocab_size=vocabulary)
    for count in (1, 2, stages, 16, 64):
        layout = Layout(1, True, pipe_size=stages, micro_batch=1, seq_length=512, accumulation=count)
        found = pipeline_of(config, ADAPTERS, layout)
        costs = [flops / count for flops in found.flops]
        took = simulated(costs, count)
        assert took == pytest.approx((1 + found.bubble) * max(found.flops), rel=0.05)


def adapters_of(rank: int) -> Adapters:
    return Adapters(LowRankSpec(rank, 1.0), ("*",))


def extra_bytes(layout: Layout, schedule: str) -> float:
    """What factors add to the bytes on the links, by the collectives themselves; an all-reduce moves them twice."""

    def moved(adapters: Adapters | None) -> float:
        chosen = replace(layout, schedules=dict.fromkeys(projections(CONFIG), schedule))
        found = wire_bytes(CONFIG, adapters, chosen)
        return sum(
            volume.payload * (2 if name == "all-reduce" else 1)
            for (group, name), volume in found.items() if group == "tensor"
        )  # fmt: skip

    return moved(ADAPTERS) - moved(Adapters(LowRankSpec(0, 1.0), ("*",)))


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 16])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_whole_sequence_takes_the_schedule_of_fewer_bytes(zero: int, micro_batch: int, accumulation: int) -> None:
    layout = Layout(
        zero, True, tensor_size=4, micro_batch=micro_batch, accumulation=accumulation, seq_length=128
    )  # fmt: skip
    chosen = choose_schedules(CONFIG, ADAPTERS, layout)
    assert len(set(chosen.values())) == 1
    other = {"ride": "partial", "partial": "ride"}[chosen["attention.o"]]
    assert extra_bytes(layout, chosen["attention.o"]) <= extra_bytes(layout, other)
    expected = "partial" if micro_batch * accumulation * 128 > 1024 else "ride"
    assert chosen["attention.o"] == expected


def test_reducing_in_every_backward_pass_makes_partial_dearer() -> None:
    layout = Layout(1, True, tensor_size=2, micro_batch=4, accumulation=8, seq_length=1024)
    assert set(choose_schedules(CONFIG, ADAPTERS, layout).values()) == {"partial"}
    assert set(choose_schedules(CONFIG, ADAPTERS, replace(layout, zero=2)).values()) == {"ride"}
    assert set(choose_schedules(CONFIG, ADAPTERS, replace(layout, overlap_comm=True)).values()) == {"ride"}
    many = replace(layout, zero=2, micro_batch=4 * (2 + CALL_BYTES // (2 * 2 * 64 * 1024)))
    assert set(choose_schedules(CONFIG, ADAPTERS, many).values()) == {"partial"}


def test_a_split_sequence_weighs_bytes_against_repeated_products() -> None:
    """3 · 2 · H operations against 2 · 2 bytes for every token and rank, whatever the batch."""
    layout = Layout(1, True, tensor_size=2, sequence=True, micro_batch=4, seq_length=1024)
    border = 4 * OPERATIONS_PER_BYTE / 6
    for hidden in (256, 512, 640, 704, 1024, 4096):
        config = replace(CONFIG, hidden_size=hidden)
        for rank in (8, 64):
            chosen = choose_schedules(config, adapters_of(rank), layout)
            assert set(chosen.values()) == {"partial" if hidden < border else "ride"}


def test_nothing_to_choose() -> None:
    everything = dict.fromkeys(projections(CONFIG), "ride")
    assert choose_schedules(CONFIG, ADAPTERS, Layout(1, True, seq_length=512)) == everything
    assert choose_schedules(CONFIG, None, Layout(1, True, tensor_size=2, seq_length=512)) == everything
    few = Adapters(LowRankSpec(64, 1.0), ("o",))
    layout = Layout(1, True, tensor_size=2, micro_batch=64, seq_length=512)
    assert choose_schedules(CONFIG, few, layout) == {**everything, "attention.o": "partial"}
