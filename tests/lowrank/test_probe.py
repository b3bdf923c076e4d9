"""A probe hands out the gradients of frozen weights and leaves everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.engine.dense import DenseEngine
from megalowrank.lowrank.factors import folded_weights
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import initialize_single_process
from tests.engine.equality_cases import batch, build, optimizer_of
from tests.harness import run_ranks


@pytest.fixture
def model(tmp_path: Path) -> BuiltModel:
    initialize_single_process(str(tmp_path / "store"))
    return build("lora", False, {"lora_init": "switchlora"})[1]


def autograd_of(model: BuiltModel, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients that autograd gives the weights if they are trained, W + s·B·A being one matrix."""
    weights = [folded.parameter for folded in folded_weights(model.layers)]
    for layer in model.layers:
        own = slice(layer.row_start, layer.row_start + layer.out_features)
        layer.weight.parameter.data[own] += layer.scale * layer.Bt.data.t() @ layer.A.data
    for weight in weights:
        weight.requires_grad_(True)
    for module in model.module.modules():
        if hasattr(module, "factors"):
            module.factors = []  # a plain linear then, whose W is trained
    losses = [model.module(tokens) for tokens in batches]
    return list(torch.autograd.grad(sum(losses[1:], losses[0]) / len(losses), weights))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_autograd(tmp_path: Path, recompute: bool, count: int) -> None:
    initialize_single_process(str(tmp_path / "store"))
    model = build("lora", False, {"lora_init": "switchlora"}, recompute)[1]
    engine = DenseEngine(model.module, model.layers, optimizer_of({}, model), 0.0)
    batches = [batch(0, micro) for micro in range(count)]
    found: dict[int, torch.Tensor] = {}
    weights = folded_weights(model.layers)
    engine.probe(batches, weights, lambda i, gradient: found.update({i: gradient.clone()}))
    expected = autograd_of(model, batches)
    assert found.keys() == set(range(len(expected)))
    for i, gradient in enumerate(expected):
        torch.testing.assert_close(found[i], gradient, rtol=0, atol=3e-7)
        assert float(gradient.abs().max()) > 1e-4


def test_nothing_is_touched(model: BuiltModel) -> None:
    engine = DenseEngine(model.module, model.layers, optimizer_of({}, model), 0.0)
    engine.train_step([batch(0, 0)], 1e-3)
    for parameter in model.module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    before = {name: (p.data.clone(), p.grad) for name, p in model.module.named_parameters()}
    moments = [partition.exp_avg.clone() for partition in engine.state.partitions]
    generator, updates = torch.get_rng_state(), engine.state.updates
    engine.probe([batch(1, 0)], folded_weights(model.layers), lambda i, gradient: None)
    for name, parameter in model.module.named_parameters():
        data, gradient = before[name]
        assert torch.equal(parameter.data, data), name
        assert parameter.grad is gradient, name
        assert gradient is None or bool((gradient == 0.5).all()), name
    assert all(torch.equal(p.exp_avg, m) for p, m in zip(engine.state.partitions, moments, strict=True))
    assert torch.equal(torch.get_rng_state(), generator) and engine.state.updates == updates
    assert all(weight.tap is None for weight in folded_weights(model.layers))


def test_one_group_at_a_time_bounds_what_is_held(model: BuiltModel) -> None:
    """With several micro-batches the sums of a group are held, and no more; with one, a single gradient."""
    engine = DenseEngine(model.module, model.layers, optimizer_of({}, model), 0.0)
    weights = folded_weights(model.layers)
    sizes = [weight.parameter.nbytes for weight in weights]

    def peak(group: list[FoldedWeight], count: int) -> int:
        return engine.probe([batch(0, micro) for micro in range(count)], group, lambda i, gradient: None)

    assert peak(weights, 2) == sum(sizes)
    assert peak(weights[:3], 2) == sum(sizes[:3])
    assert peak(weights, 1) == max(sizes)


def test_a_failing_pass_leaves_no_tap(model: BuiltModel) -> None:
    engine = DenseEngine(model.module, model.layers, optimizer_of({}, model), 0.0)

    def stop(i: int, gradient: torch.Tensor) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        engine.probe([batch(0, 0)], folded_weights(model.layers), stop)
    assert all(weight.tap is None for weight in folded_weights(model.layers))


CASES: list[dict[str, Any]] = [
    *({"stage": stage, "micro": micro, "bf16": bf16} for stage, micro, bf16 in (
        (0, 1, False), (1, 2, True), (2, 2, False), (3, 1, True), (3, 2, False),
    )),
    {"stage": 3, "micro": 2, "zero": {"stage3_param_persistence_threshold": 0}, "recompute": True},
    {"stage": 1, "micro": 2, "pipe": True},
]  # fmt: skip


def test_a_sharded_run_is_the_same_with_probes_between_its_updates(tmp_path: Path) -> None:
    """Bit by bit, under ZeRO 0 to 3 and in a pipeline; and the gradients are those of one process."""
    for reports in run_ranks("tests.lowrank.probe_cases:compare", 2, CASES, tmp_path, timeout=300):
        for case, report in zip(CASES, reports, strict=True):
            assert report["same"], case
            assert report["worst"] < (2e-3 if case.get("bf16") else 1e-6), (case, report)
            assert report["largest"] > 1e-2
