"""ReLoRA against loops over plain tensors, and what it promises: the function is kept, masters are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.errors import ConfigError
from megalowrank.methods.base import Context
from megalowrank.methods.relora import ReLoRA, ReLoRAConfig
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import initialize_single_process
from tests.engine.equality_cases import LR, STEPS, batch, build, context


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> None:
    initialize_single_process(str(tmp_path / "store"))


def start(low: bool = False, **flags: Any) -> tuple[ReLoRA, BuiltModel, DenseEngine, Context]:
    method, model = build("relora", low, flags)
    assert isinstance(method, ReLoRA)
    if low:
        model.module.bfloat16()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    ctx = context(model, engine, 0, 1)
    method.start(ctx)
    return method, model, engine, ctx


def advance(method: ReLoRA, engine: DenseEngine, ctx: Context, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        method.before_step(step, ctx)
        losses.append(float(engine.train_step([batch(step, 0)], LR).loss))
    return losses


def factors(model: BuiltModel) -> dict[str, torch.Tensor]:
    return {f"{layer.name}.{side}": p.data.clone() for layer in model.layers for side, p in
            (("A", layer.A), ("B", layer.Bt))}  # fmt: skip


@pytest.mark.parametrize("init", ["classic", "switchlora"])
def test_a_merge_keeps_the_function_and_moves_the_update_into_w(init: str) -> None:
    method, model, engine, ctx = start(lora_init=init, relora_interval=3, relora_reset="zero")
    advance(method, engine, ctx, 0, 4)
    before, weights = factors(model), [layer.weight.value().clone() for layer in model.layers]
    loss = float(engine.eval_step([batch(9, 0)]))
    method.before_step(4, ctx)
    assert float(engine.eval_step([batch(9, 0)])) == pytest.approx(loss, abs=2e-6)
    for layer, weight in zip(model.layers, weights, strict=True):
        rows = slice(layer.row_start * layer.in_features, (layer.row_start + layer.out_features) * layer.in_features)
        old = before[f"{layer.name}.B"].t() @ before[f"{layer.name}.A"]
        new = layer.Bt.data.t() @ layer.A.data
        moved = (layer.weight.value()[rows] - weight[rows]).view(layer.out_features, -1)
        assert torch.allclose(moved, layer.scale * (old - new), atol=1e-6)
        assert float(moved.abs().max()) > 1e-4
        assert not torch.equal(layer.A.data, before[f"{layer.name}.A"])
        assert bool(layer.Bt.data.any()) == (init == "switchlora")
        bound = layer.in_features**-0.5
        assert init == "switchlora" or 0.9 * bound < float(layer.A.data.abs().max()) <= bound
    moments = [piece for f in range(2 * len(model.layers)) for piece in engine.state.moments(f)]
    assert not any(bool(p.exp_avg.any() or p.exp_avg_sq.any()) for p in moments)
    assert method.counters() == {"merges": 1, "zeroed_exp_avg": 1.0, "zeroed_exp_avg_sq": 1.0}


def test_merges_come_after_every_interval_and_not_before_the_first() -> None:
    method = ReLoRA(ReLoRAConfig(relora_interval=30))
    assert [t for t in range(121) if method.due(t, 0)] == [31, 61, 91]
    assert [t for t in range(121) if method.due(t, 20)] == [11, 41, 71, 101]
    every = ReLoRA(ReLoRAConfig(relora_interval=1))
    assert [t for t in range(6) if every.due(t, 0)] == [2, 3, 4, 5]


def test_masters_are_merged_not_their_bfloat16_copies() -> None:
    method, model, engine, ctx = start(low=True, relora_interval=3, relora_reset="none")
    advance(method, engine, ctx, 0, 4)
    layer = model.layers[0]
    masters = {id(p): m.data for p, m in zip(engine._parameters, engine._masters, strict=True)}
    A, Bt = masters[id(layer.A)].clone(), masters[id(layer.Bt)].clone()
    rows = slice(0, layer.out_features * layer.in_features)
    before = layer.weight.value()[rows].clone()
    method.before_step(4, ctx)
    moved = (layer.weight.value()[rows] - before).view(layer.out_features, -1)
    exact, rounded = layer.scale * Bt.t() @ A, layer.scale * Bt.bfloat16().float().t() @ A.bfloat16().float()
    assert float((moved - exact).abs().max()) < 0.1 * float((exact - rounded).abs().max())
    assert torch.equal(masters[id(layer.A)].bfloat16(), layer.A.data) and not masters[id(layer.Bt)].any()


def test_new_masters_are_what_the_forward_pass_sees() -> None:
    """Drawn B is taken out of W as rounded to bfloat16, so that the function is kept."""
    method, model, engine, ctx = start(low=True, lora_init="switchlora", relora_interval=3, relora_reset="none")
    advance(method, engine, ctx, 0, 4)
    method.before_step(4, ctx)
    masters = {id(p): m.data for p, m in zip(engine._parameters, engine._masters, strict=True)}
    for layer in model.layers:
        for factor in (layer.A, layer.Bt):
            assert factor.any() and torch.equal(masters[id(factor)], factor.data.float())


def masks_of(model: BuiltModel, engine: DenseEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements of exp_avg and of exp_avg_sq are left, over all factors."""
    moments = [piece for f in range(2 * len(model.layers)) for piece in engine.state.moments(f)]
    return torch.cat([p.exp_avg != 0 for p in moments]), torch.cat([p.exp_avg_sq != 0 for p in moments])


@pytest.mark.parametrize("reset", ["random", "magnitude"])
@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_a_merge_prunes_nine_tenths_with_one_mask_or_two(reset: str, masks: str) -> None:
    flags = {"relora_interval": 3, "relora_reset": reset, "relora_masks": masks, "relora_prune_ratio": None}
    method, model, engine, ctx = start(**flags)
    left = []
    for first, last in ((0, 4), (4, 7)):
        advance(method, engine, ctx, first, last)
        method.before_step(last, ctx)
        left.append(masks_of(model, engine))
        assert torch.equal(*left[-1]) == (masks == "shared")
        counted = method.counters()
        for name, mask in zip(("exp_avg", "exp_avg_sq"), left[-1], strict=True):
            assert counted[f"zeroed_{name}"] == pytest.approx(0.9, abs=0.03)
            assert counted[f"zeroed_{name}"] == pytest.approx(1.0 - float(mask.float().mean()), abs=1e-6)
    assert not torch.equal(left[0][0], left[1][0]), "the second merge draws a mask of its own"


def test_nothing_low_rank_learns_from_zeros_until_the_first_merge() -> None:
    method, model, engine, ctx = start(lora_init="zero", relora_interval=3, relora_reset="zero")
    advance(method, engine, ctx, 0, 4)
    assert not any(bool(value.any()) for value in factors(model).values())
    assert engine.state.partitions[0].exp_avg.any(), "embeddings and norms do learn"
    advance(method, engine, ctx, 4, STEPS)
    assert all(bool(value.any()) for value in factors(model).values())


def test_the_zero_start_says_so() -> None:
    _, model = build("relora", False, {"lora_init": "zero", "relora_interval": 7})
    assert len(model.warnings) == 1 and "until the first merge after 7 updates" in model.warnings[0]
    assert build("relora", False, {})[1].warnings == []


@pytest.mark.parametrize("restart", [False, True])
def test_the_clock_goes_on_unless_it_is_asked_to_restart(restart: bool) -> None:
    method, _, engine, ctx = start(relora_restart_clock=restart, relora_interval=3)
    advance(method, engine, ctx, 0, 5)
    assert set(engine.state.clocks.births[1:].tolist()) == ({4} if restart else {0})


def test_draws_differ_between_merges_and_matrices_and_not_between_runs() -> None:
    drawn = []
    for _ in range(2):
        method, model, _, ctx = start()
        drawn.append([method.redraw(layer, step, ctx)[0] for layer in model.layers[:3] for step in (3, 5)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    same = [torch.equal(a, b) for i, a in enumerate(drawn[0]) for b in drawn[0][i + 1 :] if a.shape == b.shape]
    assert same and not any(same)


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"relora_interval": 0}, "--relora-interval"), ({"lora_rank": 0}, "--lora-rank"),
     ({"relora_reset": "random", "relora_prune_ratio": 1.0}, "--relora-prune-ratio is out of range"),
     ({"relora_reset": "magnitude", "relora_prune_ratio": float("nan")}, "--relora-prune-ratio is out of range"),
     ({"relora_prune_ratio": 0.5}, "--relora-prune-ratio has no effect with --relora-reset zero"),
     ({"relora_masks": "independent"}, "--relora-masks independent has no effect")],
)  # fmt: skip
def test_values_out_of_range(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ReLoRAConfig(**flags).check()
