"""HeteroLoRA on one process: what is off stays as it is, and comes back where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import host_allocator
from megalowrank.errors import ConfigError
from megalowrank.methods.base import Context
from megalowrank.methods.heterolora import HeteroLoRA, HeteroLoRAConfig
from megalowrank.methods.importance import gradients, values
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_single_process

SHAPE = ModelConfig(num_layers=2, hidden_size=12, ffn_hidden_size=18, num_attention_heads=2, vocab_size=29)
LENGTH, LR, DECAY, BETAS, EPS = 9, 2e-2, 0.3, (0.9, 0.99), 1e-6


@pytest.fixture(autouse=True)
def single(tmp_path: Path) -> None:
    initialize_single_process(str(tmp_path / "store"))


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 29, (3, LENGTH + 1), generator=torch.Generator().manual_seed(step))


class Trial:
    """A run in float64."""

    def __init__(self, **flags: Any) -> None:
        config = HeteroLoRAConfig(**{"lora_rank": 3, "hetero_interval": 3, "hetero_warmup_iters": 2, **flags})
        config.check()
        self.method = HeteroLoRA(config)
        self.model: BuiltModel = build_llama(SHAPE, self.method, length=LENGTH, seed=1, dtype=torch.float64)
        trained = [p for p in self.model.module.parameters() if p.requires_grad]
        optimizer = VectorClockAdamW(trained, LR, BETAS, EPS, DECAY)
        self.engine = DenseEngine(self.model.module, self.model.layers, optimizer, 0.0)
        self.ctx = Context(
            self.model.layers, self.engine.state, 1, 20, 0, 1, host_allocator(False), engine=self.engine,
            names=self.model.names, ahead=lambda k: [batch(self.at + k)],
        )  # fmt: skip
        self.at, self.events = 0, list[dict[str, Any]]()
        self.method.start(self.ctx)

    def before(self) -> None:
        self.ctx.micro_batches = [batch(self.at)]
        self.method.before_step(self.at, self.ctx)
        self.events += self.method.events()

    def step(self) -> float:
        result = self.engine.train_step(self.ctx.micro_batches, LR)
        self.at += 1
        return float(result.loss)

    def factors(self) -> dict[str, torch.Tensor]:
        found = {f"{layer.name}.A": layer.A for layer in self.model.layers}
        return found | {f"{layer.name}.B": layer.Bt for layer in self.model.layers}

    def moments(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        names = [f"{layer.name}.{side}" for layer in self.model.layers for side in "AB"]
        (piece,) = self.engine.state.moments(names.index(name))
        return piece.exp_avg, piece.exp_avg_sq


@pytest.mark.parametrize("shortcuts", ["off", "separated", "combined"])
def test_what_is_off_is_left_alone_as_torch_leaves_what_has_no_gradient(shortcuts: str) -> None:
    """Every update against torch's AdamW, factor by factor, whose gradient is None while a module is off."""
    trial = Trial(hetero_shortcuts=shortcuts, hetero_score="constant", hetero_budget=0.4)
    twins = {name: torch.nn.Parameter(factor.detach().clone()) for name, factor in trial.factors().items()}
    optimizer = torch.optim.AdamW(list(twins.values()), LR, BETAS, EPS, DECAY)
    switched = 0
    for _ in range(14):
        trial.before()
        on = {layer.name: layer.enabled for layer in trial.model.layers}
        loss = trial.model.module(batch(trial.at))
        found = torch.autograd.grad(loss, list(trial.factors().values()))
        for (name, twin), gradient in zip(twins.items(), found, strict=True):
            off = not on[name.rpartition(".")[0]]
            twin.grad = None if off else gradient
            assert not off or not gradient.any()
            switched += off
        optimizer.step()
        assert trial.step() == float(loss)
        for name, factor in trial.factors().items():
            torch.testing.assert_close(factor.data, twins[name].data, rtol=0, atol=1e-12)
            state = optimizer.state.get(twins[name], {})
            for mine, kind in zip(trial.moments(name), ("exp_avg", "exp_avg_sq"), strict=True):
                theirs = state.get(kind, torch.zeros_like(factor)).reshape(-1)
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert switched > 50 and [event["step"] for event in trial.events] == [3, 6, 9, 12]
    assert len({tuple(event["on"]) for event in trial.events}) > 1, "the lot falls anew every time"


def test_factors_that_are_off_cost_nothing_and_change_nothing() -> None:
    """They may be NaN: no product sees them."""
    trial = Trial(hetero_budget=0.3)
    for _ in range(3):
        trial.before()
        trial.step()
    with torch.no_grad():
        expected = trial.model.module(batch(0))
        for layer in trial.model.layers:
            if not layer.enabled:
                layer.A.data.fill_(torch.nan)
        assert trial.model.module(batch(0)) == expected


def test_an_event_says_what_is_on_and_counters_count_it() -> None:
    trial = Trial(hetero_shortcuts="separated")
    for _ in range(3):
        trial.before()
        trial.step()
    (event,) = trial.events
    assert sorted([*event["on"], *event["off"]]) == sorted(trial.model.names)
    assert list(event["on"]) == [layer.name for layer in trial.model.layers if layer.enabled]
    assert len(event["on"]) == 14 // 4 + round(7 / 4) and event["score"] == "grad-norm"
    assert trial.method.counters()["modules_on"] == len(event["on"])
    assert trial.method.left_out(trial.method.state_dict()) == set(event["off"])


def test_gradients_are_those_of_autograd_for_shortcuts_too() -> None:
    """The probe makes them of the gradient of W, or of what would be one."""
    trial = Trial(hetero_shortcuts="combined")
    for _ in range(2):
        trial.before()
        trial.step()
    batches = [[batch(5), batch(6)], [batch(7), batch(8)]]
    probed = gradients(trial.ctx, batches, values(trial.ctx))
    total = sum(trial.model.module(tokens) for pair in batches for tokens in pair) / 2
    for layer, (a, b) in zip(trial.model.layers, probed, strict=True):
        exact = torch.autograd.grad(total, [layer.A, layer.Bt], retain_graph=True)
        for mine, theirs in zip((a, b), exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)
            assert float(theirs.abs().max()) > 1e-7


def test_a_score_that_is_not_finite_decides_nothing() -> None:
    trial = Trial(hetero_warmup_iters=0)
    trial.before()
    on = [layer.enabled for layer in trial.model.layers]
    trial.step()
    trial.at = 3
    trial.model.module.embedding.weight.data[batch(3)[0, 0]] = torch.inf
    trial.before()
    assert [layer.enabled for layer in trial.model.layers] == on and sum(on) == 3
    assert trial.events[-1]["kept"] == "a score is not finite"


def test_saved_and_loaded_it_goes_on_bit_by_bit() -> None:
    """In the middle of an interval, with clocks that stand still."""
    first, second = Trial(), Trial()
    for _ in range(7):
        first.before()
        first.step()
    saved = first.method.state_dict()
    for mine, theirs in zip(second.engine.state.partitions, first.engine.state.partitions, strict=True):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            getattr(mine, kind).copy_(getattr(theirs, kind))
        mine.updates = theirs.updates
    second.engine.state.clocks.load(first.engine.state.clocks.births)
    second.method.load_state_dict(saved)
    second.engine.reload()
    second.at = first.at
    for _ in range(6):
        for trial in (first, second):
            trial.before()
            trial.step()
    pairs = zip(first.factors().values(), second.factors().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert first.method.state_dict() == second.method.state_dict() != saved


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hetero_score": "snip", "hetero_warmup_iters": 0}, "--hetero-score snip is 0 for every module"),
        (
            {
                "hetero_score": "snip",
                "hetero_warmup_iters": 0,
                "lora_init": "switchlora",
                "hetero_shortcuts": "combined",
            },
            "--hetero-score snip is 0 for every module (or shortcut)",
        ),
        ({"hetero_score": "synflow", "hetero_warmup_iters": 0}, "--hetero-warmup-iters"),
        ({"hetero_budget": 0.0}, "--hetero-budget"),
        ({"hetero_budget": 0.01}, "--hetero-budget leaves none of 14"),
        ({"hetero_interval": -1}, "--hetero-interval"),
    ],
)
def test_refusals(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Trial(**flags)
    assert said in str(caught.value)


def test_without_B_nothing_is_chosen_until_it_has_moved() -> None:
    """A first update at a rate of 0, as warm-ups of the rate have it, leaves B at 0."""
    trial = Trial(hetero_score="snip", hetero_warmup_iters=1, hetero_interval=50)
    for rate in (0.0, 0.0, LR, LR):
        trial.before()
        trial.engine.train_step(trial.ctx.micro_batches, rate)
        trial.at += 1
    assert [event.get("kept", "")[:6] for event in trial.events] == ["B is 0", "B is 0", ""]
    assert sum(layer.enabled for layer in trial.model.layers) == 3


def test_a_score_that_is_not_finite_is_taken_again_with_the_next_batch() -> None:
    trial = Trial(hetero_score="alpha-test", hetero_interval=50)
    for _ in range(2):
        trial.before()
        trial.step()
    norm = trial.model.module.layers[0].input_layernorm.weight
    kept = norm.detach().clone()
    norm.data.fill_(torch.nan)
    trial.before()
    assert trial.events[0]["kept"] == "a score is not finite" and trial.method.state_dict()["due"]
    assert all(layer.enabled for layer in trial.model.layers)
    norm.data.copy_(kept)
    trial.method.retry(trial.at, trial.ctx)
    assert "on" in trial.method.events()[0] and not trial.method.state_dict()["due"]
    assert sum(layer.enabled for layer in trial.model.layers) == 3
