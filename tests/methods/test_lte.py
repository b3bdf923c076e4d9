"""LTE on one process: its start, what a merge does, and the heads of a rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import host_allocator
from megalowrank.methods.base import Context, Method
from megalowrank.methods.lora import LoRA, LoRAConfig
from megalowrank.methods.lte import LTE, LTEConfig
from megalowrank.methods.lte_merge import merge_bytes
from megalowrank.models.build import BuiltModel, MatrixShape, build_llama
from megalowrank.parallel.groups import initialize_single_process

SHAPE = ModelConfig(num_layers=2, hidden_size=12, ffn_hidden_size=17, num_attention_heads=2, vocab_size=29)
LENGTH, LR = 9, 2e-3


@pytest.fixture(autouse=True)
def single(tmp_path: Path) -> None:
    initialize_single_process(str(tmp_path / "store"))


def lte(head: int = 0, **flags: Any) -> LTE:
    method = LTE(LTEConfig(**{"lora_rank": 3, "lora_alpha": 6.0, "lte_merge_interval": 2, **flags}))
    method.head = head
    return method


def run_of(method: Method) -> tuple[BuiltModel, DenseEngine, Context]:
    """A run in float64 before its first update."""
    model = build_llama(SHAPE, method, length=LENGTH, seed=1, dtype=torch.float64)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(trained, eps=1e-6), 0.0)
    ctx = Context(model.layers, engine.state, 1, 20, 0, 1, host_allocator(False), engine=engine)
    method.start(ctx)
    return model, engine, ctx


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 29, (4, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(method: Method, steps: int) -> tuple[list[float], BuiltModel, DenseEngine, Context]:
    model, engine, ctx = run_of(method)
    losses = []
    for step in range(steps):
        method.before_step(step, ctx)
        losses.append(float(engine.train_step([batch(step)], LR).loss))
    return losses, model, engine, ctx


def test_a_starts_with_orthonormal_rows_of_the_whole_matrix() -> None:
    matrix = MatrixShape("layers.0.mlp.up", 3, 17, 12)
    A, Bt = lte().initial_factors(matrix, 1, torch.float64)
    assert torch.allclose(A @ A.t(), torch.eye(3, dtype=torch.float64) * 12 / 3, atol=1e-12)
    assert not Bt.any() and Bt.shape == (3, 17)


def test_every_head_and_matrix_draws_its_own() -> None:
    matrix, other = MatrixShape("layers.0.mlp.up", 3, 17, 12), MatrixShape("layers.1.mlp.up", 3, 17, 12)
    found = [lte(head).initial_factors(m, 1, torch.float64)[0] for head in (0, 1) for m in (matrix, other)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_heads_of_a_rank_are_those_of_ranks_of_their_own() -> None:
    """Head k of rank h is head K·h + k; the length of rows is that of a head's own rank."""
    both = lte(1, lte_heads_per_rank=2).initial_factors(MatrixShape("x", 6, 17, 12), 1, torch.float64)[0]
    apart = [lte(head).initial_factors(MatrixShape("x", 3, 17, 12), 1, torch.float64)[0] for head in (2, 3)]
    assert torch.equal(both, torch.cat(apart))


@pytest.mark.parametrize("interval", [1, 3])
def test_one_head_learns_what_lora_learns(interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is merged: the function of LoRA, with the same start and nothing else trained."""
    found, merged, _, _ = train(lte(lte_merge_interval=interval), 8)
    start = lte()
    plain = LoRA(LoRAConfig(lora_rank=3, lora_alpha=6.0, lora_init="classic"))
    monkeypatch.setattr(plain, "initial_factors", start.initial_factors)
    model, engine, _ = run_of(plain)
    factors = {id(p) for layer in model.layers for p in (layer.A, layer.Bt)}
    losses = []
    for step in range(8):
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        loss = model.module(batch(step))
        loss.backward()
        for p in model.module.parameters():
            if p.requires_grad and id(p) not in factors:
                p.grad = None
        losses.append(float(loss))
        stepped = engine.train_step([], LR)
        assert stepped.applied
    assert found == pytest.approx(losses, abs=1e-12)
    assert merged.layers[0].fixed[0].parameter.any(), "it was merged"


def test_right_after_a_merge_w_alone_is_the_function() -> None:
    method = lte(lte_merge_interval=3)
    _, model, _, ctx = train(method, 3)
    before = model.module(batch(9))
    method.before_step(3, ctx)
    merged = model.module(batch(9))
    with torch.no_grad():
        for layer in model.layers:
            for factor in (layer.A, layer.Bt, *(fixed.parameter for fixed in layer.fixed)):
                factor.zero_()
    assert float(merged) == pytest.approx(float(before), abs=1e-13)
    assert float(model.module(batch(9))) == pytest.approx(float(before), abs=1e-13)


def test_an_evaluation_sees_what_was_learned_and_leaves_no_trace() -> None:
    method = lte(lte_merge_interval=100)
    _, model, engine, ctx = train(method, 5)
    weight = model.layers[0].weight.parameter
    kept, function = weight.detach().clone(), float(model.module(batch(9)))
    method.settle(ctx)
    settled = float(engine.eval_step([batch(9)]))
    assert not torch.equal(weight, kept) and settled == pytest.approx(function, abs=1e-13)
    method.unsettle(ctx)
    assert torch.equal(weight, kept) and not model.layers[0].fixed[0].parameter.any()


def test_a_reset_draws_anew_and_forgets() -> None:
    method = lte(lte_merge_interval=3, lte_reset=True)
    _, model, engine, ctx = train(method, 3)
    layer = model.layers[0]
    rows = slice(layer.row_start, layer.row_start + layer.out_features)
    expected = layer.weight.parameter[rows].detach() + layer.scale * layer.Bt.detach().t() @ layer.A.detach()
    old = layer.A.detach().clone()
    method.before_step(3, ctx)
    assert torch.allclose(layer.weight.parameter[rows], expected, atol=1e-14)
    assert not layer.Bt.any() and not torch.allclose(layer.A, old)
    assert torch.allclose(layer.A @ layer.A.t(), torch.eye(3, dtype=torch.float64) * layer.in_features / 3, atol=1e-12)
    assert not engine.state.partitions[0].exp_avg.any() and not engine.state.partitions[0].exp_avg_sq.any()
    assert (engine.state.clocks.births[1:] == 3).all() and not layer.fixed[0].parameter.any()


def test_heads_of_a_rank_learn_apart() -> None:
    """Two heads on one process: the mean loss is that of two runs of one head, each with half of every batch."""
    found, _, _, _ = train(lte(lte_heads_per_rank=2, lte_merge_interval=100), 6)
    halves = []
    for head in (0, 1):
        method = lte(head, lte_merge_interval=100)
        _, engine, ctx = run_of(method)
        halves.append([float(engine.train_step([batch(step).chunk(2)[head]], LR).loss) for step in range(6)])
    assert found == pytest.approx([math.fsum(pair) / 2 for pair in zip(*halves, strict=True)], abs=1e-12)


def test_factors_or_products_whichever_are_fewer_bytes() -> None:
    """H r (m + n) < m n, with snapshots and float32 on both sides."""
    for heads, rank, size in ((2, 64, 1024), (8, 64, 1024), (16, 32, 1024), (4, 128, 768)):
        factors, dense = merge_bytes(2 * rank, size, size, heads, 4)
        assert (factors < dense) == (heads * rank * 2 * size < size * size)
        assert dense == 2 * (heads - 1) / heads * size * size * 4
