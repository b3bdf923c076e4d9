"""SwitchLoRA against an independent reimplementation of its public reference, and what a switch must keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import megalowrank.models.build as build_module
from megalowrank.config import ModelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.methods.base import Context
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.methods.switchlora import SwitchLoRA, SwitchLoRAConfig, switch_rate
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_single_process
from tests.methods.ring import LR, SEED, STEPS, Ring, Trial, host, numpy, rate_of

# ---------------------------------------------------------------- against the reference


def random_setting(number: int) -> tuple[list[tuple[int, int, int]], dict[str, Any]]:
    """Shapes (m, n, r) of three matrices and flags; ranks are often close to the size, or 1, or equal to it."""
    source = np.random.default_rng(number)
    shapes = []
    for _ in range(3):
        m, n = source.integers(3, 19, 2).tolist()
        low = max(1, min(m, n) - 4) if source.random() < 0.5 else 1
        shapes.append((m, n, int(source.integers(low, min(m, n) + 1))))
    freeze = int(source.integers(0, 4))
    interval = int(source.integers(max(2 * freeze, 1), 2 * freeze + 4))
    schedule = ("exponential", "sigmoid", "constant")[number % 3]
    descent = float(source.uniform(0.3, 2.0))
    return shapes, {
        "switch_freeze_steps": freeze, "switch_interval": interval, "switch_schedule": schedule,
        "switch_descent_rate": SwitchLoRAConfig.switch_descent_rate if schedule == "constant" else descent,
    }  # fmt: skip


def frozen_rows(ranges: list[tuple[int, int]]) -> set[int]:
    return {row for start, stop in ranges for row in range(start, stop)}


def compare(trial: Trial, rings: list[Ring], tolerance: float) -> None:
    """A, B, W, moments, clocks and what is frozen, after an update."""
    state = trial.engine.state
    (partition,) = state.partitions
    for j, (layer, ring) in enumerate(zip(trial.module.layers, rings, strict=True)):
        np.testing.assert_allclose(numpy(layer.weight.parameter), ring.W, rtol=0, atol=tolerance)
        for side, (kind, factor, gate) in enumerate((("A", layer.A, layer.gate_A), ("B", layer.Bt, layer.gate_Bt))):
            np.testing.assert_allclose(numpy(factor), ring.vectors[kind], rtol=0, atol=tolerance)
            assert frozen_rows(gate.frozen) == ring.frozen_now[kind]
            first = int(state.clocks.first[2 * j + side])
            clock = state.updates - state.clocks.births[first : first + layer.rank]
            np.testing.assert_array_equal(clock, ring.adam[kind][2])
            (own,) = [f for f in partition.fragments if f.parameter is factor]
            for flat, moment in ((partition.exp_avg, 0), (partition.exp_avg_sq, 1)):
                values = numpy(flat[own.offset : own.offset + own.numel]).reshape(factor.shape)
                np.testing.assert_allclose(values, ring.adam[kind][moment], rtol=0, atol=tolerance)


def compare_pools(trial: Trial, rings: list[Ring], tolerance: float) -> None:
    """The spare vectors in the order in which they come next."""
    for j, ring in enumerate(rings):
        spare = ring.C - ring.r
        order = [(int(trial.method.switched[j]) + i) % max(spare, 1) for i in range(spare)]
        for factor, kind in ((2 * j, "A"), (2 * j + 1, "B")):
            np.testing.assert_allclose(trial.pool(factor)[order], ring.queue(kind), rtol=0, atol=tolerance)


def run_against_rings(number: int, dtype: torch.dtype, tolerance: float) -> list[Ring]:
    shapes, flags = random_setting(number)
    trial = Trial.build(number, dtype, shapes, **flags)
    rings, source = trial.rings(), torch.Generator().manual_seed(number)
    for t in range(STEPS):
        gradients = trial.module.draw(source)
        draws = trial.method.draws(np.array([t]), trial.ctx)[0]
        rate = rate_of(flags["switch_schedule"], t, flags["switch_descent_rate"] * STEPS)
        counts = [
            ring.step(ring.r / (flags["switch_interval"] / rate), draw, {k: numpy(v) for k, v in own.items()})
            for ring, draw, own in zip(rings, draws, gradients, strict=True)
        ]
        before = trial.method.switched.copy()
        trial.method.before_step(t, trial.ctx)
        assert (trial.method.switched - before).tolist() == counts, t
        trial.engine.train_step([gradients], LR)
        compare(trial, rings, tolerance)
        if t % 20 == 19:
            compare_pools(trial, rings, tolerance)
    return rings


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_ring_of_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    rings = [ring for number in range(24) for ring in run_against_rings(number, dtype, tolerance)]
    active = [ring for ring in rings if ring.most > 0]
    assert len(active) > 40 and len(active) < len(rings)
    assert sum(ring.most > ring.C - ring.r for ring in active) > 5, "some switch more than the pool holds"
    assert max(ring.most for ring in active) >= 5


def test_the_comparison_can_fail() -> None:
    """A reference that takes the next slot but one is noticed."""

    class Wrong(Ring):
        def switch(self, kind: str, k: int) -> None:
            super().switch(kind, k)
            self.pointer[kind] = (self.pointer[kind] + (k > 1)) % self.r

    trial = Trial.build(0, torch.float64, [(12, 12, 6)], switch_interval=4, switch_freeze_steps=1)
    (ring,) = trial.rings()
    ring.__class__ = Wrong
    source = torch.Generator().manual_seed(0)
    with pytest.raises(AssertionError):
        for t in range(8):
            (own,) = gradients = trial.module.draw(source)
            ring.step(6 / 4, 0.0, {k: numpy(v) for k, v in own.items()})
            trial.method.before_step(t, trial.ctx)
            trial.engine.train_step([gradients], LR)
            compare(trial, [ring], 1e-5)


# ---------------------------------------------------------------- what every switch keeps


def rows_of(trial: Trial, j: int, side: int) -> list[tuple[float, ...]]:
    """All vectors of one factor, active and spare, as a sorted list."""
    layer = trial.module.layers[j]
    active = numpy(layer.A if side == 0 else layer.Bt)
    return sorted(map(tuple, np.concatenate((active, trial.pool(2 * j + side)))))


def product(layer: LowRankFactors) -> np.ndarray:
    return numpy(layer.weight.parameter) + layer.scale * numpy(layer.Bt).T @ numpy(layer.A)


@pytest.mark.parametrize("order", ["fifo", "random"])
@pytest.mark.parametrize("freeze", [0, 2])
def test_a_switch_exchanges_vectors_and_keeps_the_product(order: str, freeze: int) -> None:
    """Also with more switches than slots: no vector is lost or doubled, and W + sBA stays what it was."""
    shapes = [(12, 20, 4), (9, 9, 8), (6, 11, 5), (7, 7, 7)]
    trial = Trial.build(3, torch.float64, shapes, switch_interval=4, switch_freeze_steps=freeze, switch_order=order,
                        switch_schedule="constant")  # fmt: skip
    source, overflowed = torch.Generator().manual_seed(1), 0
    for t in range(30):
        before = [product(layer) for layer in trial.module.layers]
        vectors = [rows_of(trial, j, side) for j in range(len(shapes)) for side in (0, 1)]
        switched = trial.method.switched.copy()
        trial.method.before_step(t, trial.ctx)
        for layer, old in zip(trial.module.layers, before, strict=True):
            np.testing.assert_allclose(product(layer), old, rtol=0, atol=1e-12)
        assert vectors == [rows_of(trial, j, side) for j in range(len(shapes)) for side in (0, 1)]
        overflowed += bool((trial.method.switched - switched > trial.method.geometry.spare).any())
        trial.engine.train_step([trial.module.draw(source)], LR)
    assert (trial.method.switched[:3] > 20).all() and trial.method.switched[3] == 0
    assert overflowed > 3


def test_random_slots_are_distinct_and_in_range() -> None:
    shapes = [(12, 20, 4), (9, 9, 8), (40, 30, 10)]
    trial = Trial.build(4, torch.float32, shapes, switch_interval=2, switch_freeze_steps=0, switch_order="random",
                        switch_schedule="constant")  # fmt: skip
    spare, seen = trial.method.geometry.spare, [set() for _ in shapes]
    for t in range(40):
        plan = trial.method._planned[1] if trial.method._planned else None
        trial.method.before_step(t, trial.ctx)
        trial.engine.train_step([trial.module.draw(torch.Generator().manual_seed(t))], LR)
        for j in range(len(shapes)) if plan is not None else ():
            for factor in (2 * j, 2 * j + 1):
                slots = plan.fetched.rows[plan.fetched.factors == factor].tolist()
                assert len(slots) == len(set(slots)) == min(plan.counts[j], spare[j])
                assert all(0 <= slot < spare[j] for slot in slots)
                seen[j].update(slots)
    assert [len(s) for s in seen] == spare.tolist(), "every candidate is used"


def test_ranks_agree_on_every_plan() -> None:
    """The schedule does not know which rank it runs on; pools hold each slot exactly once."""
    shapes = [(12, 20, 4), (9, 9, 8), (40, 30, 10)]
    for order in ("fifo", "random"):
        flags = {"switch_interval": 4, "switch_freeze_steps": 2, "switch_order": order}
        ranks = [Trial.build(5, torch.float32, shapes, rank, 2, **flags) for rank in (0, 1)]
        for t in range(20):
            plans = [trial.method._plan(t, trial.ctx) for trial in ranks]
            for field in ("outgoing", "slots", "counterparts", "touched"):
                first, second = (getattr(plan, field) for plan in plans)
                assert first.factors.tolist() == second.factors.tolist()
                assert first.rows.tolist() == second.rows.tolist()
            for trial, plan in zip(ranks, plans, strict=True):
                trial.method._advance(plan.counts)
        whole = Trial.build(5, torch.float32, shapes, **flags)
        for factor in range(6):
            parts = [trial.pool(factor) for trial in ranks]
            joined = np.zeros_like(whole.pool(factor))
            joined[0::2], joined[1::2] = parts
            np.testing.assert_array_equal(joined, whole.pool(factor))


# ---------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    initialize_single_process(str(tmp_path_factory.mktemp("store") / "store"))
    yield


def config(**changed: Any) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 12, "ffn_hidden_size": 17, "num_attention_heads": 2,
             "num_query_groups": 1, "vocab_size": 29, **changed}  # fmt: skip
    return ModelConfig(**sizes)


def llama(flags: dict[str, Any], **changed: Any) -> tuple[SwitchLoRA, BuiltModel]:
    method = SwitchLoRA(SwitchLoRAConfig(**flags))
    return method, build_llama(config(**changed), method, length=16, seed=SEED)


@pytest.mark.parametrize("order", ["fifo", "random"])
@pytest.mark.parametrize("rank", [2, 5])
def test_a_switch_leaves_the_logits_of_a_llama_alone(one_process: None, order: str, rank: int) -> None:
    flags = {
        "lora_rank": rank,
        "lora_alpha": rank,
        "switch_interval": 4,
        "switch_freeze_steps": 2,
        "switch_order": order,
    }
    method, model = llama(flags)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    ctx = Context(model.layers, engine.state, SEED, STEPS, 0, 1, host)
    method.start(ctx)
    source = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 29, (2, 16), generator=source)
    changed = 0
    for t in range(20):
        with torch.no_grad():
            logits, weights = model.module.logits(probe), [numpy(layer.weight.parameter) for layer in model.layers]
            switched = int(method.switched.sum())
            method.before_step(t, ctx)
            torch.testing.assert_close(model.module.logits(probe), logits, rtol=0, atol=1e-5)
        moved = any(
            (numpy(layer.weight.parameter) != old).any() for layer, old in zip(model.layers, weights, strict=True)
        )
        assert moved == (int(method.switched.sum()) > switched)
        changed += moved
        engine.train_step([torch.randint(0, 29, (4, 17), generator=source)], LR)
    assert changed > 10


def test_initial_function_is_that_of_the_plain_model(one_process: None) -> None:
    """s·B·A is taken out of W, and W is what the same seed gives without factors."""
    _, adapted = llama({"lora_rank": 5, "lora_alpha": 5})
    plain = build_llama(config(), FullRank(FullRankConfig()), length=16, seed=SEED)
    probe = torch.randint(0, 29, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted.module.logits(probe), plain.module.logits(probe), rtol=0, atol=1e-5)
    assert all(float(layer.Bt.abs().max()) > 0.1 for layer in adapted.layers)


# ---------------------------------------------------------------- schedules, warnings, refusals


def test_schedules() -> None:
    steps = np.array([0, 9, 99, 100, 299, 10**6])
    exponential = switch_rate("exponential", steps, 100.0)
    np.testing.assert_allclose(exponential[:5], [0.3**0.01, 0.3**0.1, 0.3, 0.3**1.01, 0.027], rtol=1e-12)
    assert exponential[-1] == 1e-8
    sigmoid = switch_rate("sigmoid", steps, 100.0)
    np.testing.assert_allclose(sigmoid[[0, 2, 3]], [1 / (1 + np.exp(-10)), 1 / (1 + np.exp(-0.1)), 0.5], rtol=1e-12)
    assert 0 <= sigmoid[-1] < 1e-300 and np.isfinite(sigmoid).all()
    assert switch_rate("constant", steps, 100.0).tolist() == [1.0] * 6


def test_expected_number_of_switches() -> None:
    """r · Σ rate / interval on average over matrices; the draws are uniform."""
    trial = Trial.build(6, torch.float32, [(40, 40, 7)] * 60, switch_interval=30, switch_freeze_steps=0,
                        switch_schedule="constant")  # fmt: skip
    for t in range(200):
        trial.method.before_step(t, trial.ctx)
    mean = trial.method.switched.mean()
    assert abs(mean - 200 * 7 / 30) < 4 * np.sqrt(200 * 0.25 / 60)
    assert trial.method.switched.std() > 1, "matrices draw independently"


def test_warns_of_matrices_that_can_never_switch(one_process: None) -> None:
    """Rank 6 is the size of k and v; rank 1 cannot switch anywhere."""
    (warning,) = llama({"lora_rank": 6})[1].warnings
    assert "4 of 14 matrices can never switch at rank 6" in warning and "layers.0.attention.k" in warning
    (warning,) = llama({"lora_rank": 1})[1].warnings
    assert "14 of 14" in warning and "rank 1" in warning
    assert llama({"lora_rank": 5})[1].warnings == []


def test_rank_above_a_matrix_is_refused_before_anything_is_built(one_process: None, monkeypatch: Any) -> None:
    def built(*args: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(build_module, "Transformer", built)
    with pytest.raises(ConfigError, match=r"--lora-rank .*layers\.0\.attention\.k .*7"):
        llama({"lora_rank": 7})
    with pytest.raises(ConfigError, match=r"--lora-rank .*layers\.0\.mlp\.down .*13"):
        llama({"lora_rank": 13, "lora_target": ["down"]})
    with pytest.raises(AssertionError, match="was built"):
        llama({"lora_rank": 12, "lora_target": ["down"]})


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [({"switch_interval": 9, "switch_freeze_steps": 5}, "--switch-interval"), ({"switch_interval": 0}, "-interval"),
     ({"switch_freeze_steps": -1}, "--switch-freeze-steps"), ({"switch_descent_rate": 0.0}, "--switch-descent-rate"),
     ({"switch_descent_rate": float("nan")}, "--switch-descent-rate"), ({"lora_rank": 0}, "--lora-rank"),
     ({"lora_alpha": 0.0}, "--lora-alpha")],
)  # fmt: skip
def test_flags_out_of_range(flags: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        SwitchLoRAConfig(**flags).check()
    SwitchLoRAConfig(switch_interval=10, switch_freeze_steps=5).check()
    SwitchLoRAConfig(switch_interval=1, switch_freeze_steps=0).check()
