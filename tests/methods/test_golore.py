"""GoLore and GaLore against plain arithmetic on one matrix, and where SVD stalls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalowrank.errors import ConfigError
from megalowrank.methods.galore import GaLore, GaLoreConfig
from megalowrank.methods.golore import GoLore, GoLoreConfig
from tests.methods.projected import Trial

BETAS = (0.9, 0.999)
SHAPES = [(9, 6), (6, 9), (7, 7)]


def target_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def quadratic(shape: tuple[int, int]) -> Any:
    """½|X - batch·target|², whose gradient is X - batch·target."""
    target = target_of(shape)
    return lambda X, batch: 0.5 * (X - batch * target).square().sum()


def batch_of(step: int) -> torch.Tensor:
    return torch.tensor(1.0 + 0.1 * (step % 3), dtype=torch.float64)


def reference(
    shape: tuple[int, int], steps: int, *, rank: int, gap: int, scale: float, lr: float, rotate: bool
) -> torch.Tensor:
    """Projected Adam as the papers write it, on X itself: no factors, gradients projected after they are made."""
    target, X = target_of(shape), torch.zeros(shape, dtype=torch.float64)
    right = shape[0] >= shape[1]
    m = v = P = None
    for step in range(steps):
        G = X - batch_of(step) * target
        if step % gap == 0:
            U, _, Vh = torch.linalg.svd(G)
            new = Vh[:rank] if right else U[:, :rank].t()
            new = new * torch.sign(new.gather(1, new.abs().argmax(1, keepdim=True)))
            if m is not None and rotate:
                m = m @ P @ new.t() if right else new @ P.t() @ m
            P = new
        g = scale * (G @ P.t() if right else P @ G)
        m = (1 - BETAS[0]) * g + (BETAS[0] * m if m is not None else 0)
        v = (1 - BETAS[1]) * g.square() + (BETAS[1] * v if v is not None else 0)
        corrected = m / (1 - BETAS[0] ** (step + 1)), v / (1 - BETAS[1] ** (step + 1))
        step_low = lr * corrected[0] / (corrected[1].sqrt() + 1e-12)
        X = X - scale * (step_low @ P if right else P.t() @ step_low)
    return X


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_projected_adam_on_either_side(shape: tuple[int, int], rotate: bool) -> None:
    """Through four refreshes: if the rotated momentum were forgotten, or one were late, the end would be another."""
    flags: dict[str, Any] = {"lora_rank": 3, "update_proj_gap": 5, "proj_scale": 0.3}
    method = GoLore(GoLoreConfig(**flags, rand_ratio=1.0)) if rotate else GaLore(GaLoreConfig(**flags))
    trial = Trial(method, torch.zeros(shape), quadratic(shape), 20)
    for step in range(20):
        trial.update(step, batch_of(step), 0.05)
    options = {"rank": 3, "gap": 5, "scale": 0.3, "lr": 0.05}
    expected = reference(shape, 20, **options, rotate=rotate)
    torch.testing.assert_close(trial.module.whole().detach(), expected, rtol=0, atol=1e-9)
    other = reference(shape, 20, **options, rotate=not rotate)
    assert float((other - expected).abs().max()) > 1e-3, "the reference does not tell rotation from none"


def test_momentum_is_the_rotated_one_after_the_next_step_too() -> None:
    """exp_avg after the update after a refresh is β²·turned + …: the reference's optimizer form loses it there."""
    shape, beta = (9, 6), BETAS[0]
    trial = Trial(GoLore(GoLoreConfig(lora_rank=3, update_proj_gap=4)), torch.zeros(shape), quadratic(shape), 100)
    for step in range(4):
        trial.update(step, batch_of(step), 0.05)
    before, old = trial.engine.state.exp_avg(1).clone(), trial.module.A.detach().clone()
    trial.announce(4, batch_of(4))
    new = trial.module.A.detach().clone()
    turned = (before.t() @ old @ new.t()).t()
    assert float((turned - before).abs().max()) > 1e-2
    torch.testing.assert_close(trial.engine.state.exp_avg(1), turned, rtol=0, atol=1e-12)
    gradients = []
    for step in (4, 5):
        G = trial.module.whole().detach() - batch_of(step) * target_of(shape)
        gradients.append((G @ new.t()).t())
        trial.engine.train_step([batch_of(step)], 0.05)
    expected = beta**2 * turned + beta * (1 - beta) * gradients[0] + (1 - beta) * gradients[1]
    torch.testing.assert_close(trial.engine.state.exp_avg(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_refresh_keeps_the_function_and_begins_at_zero(shape: tuple[int, int]) -> None:
    trial = Trial(GoLore(GoLoreConfig(lora_rank=3, update_proj_gap=3)), torch.zeros(shape), quadratic(shape), 100)
    for step in range(3):
        trial.update(step, batch_of(step), 0.05)
    whole, projector = trial.module.whole().detach().clone(), trial.module.layer.fixed[0].parameter.clone()
    trial.announce(3, batch_of(3))
    torch.testing.assert_close(trial.module.whole().detach(), whole, rtol=0, atol=1e-12)
    trained = trial.module.Bt if trial.trained else trial.module.A
    fixed = trial.module.layer.fixed[0].parameter
    assert not trained.any() and float((fixed - projector).abs().max()) > 0.02
    torch.testing.assert_close(fixed @ fixed.t(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(trial.module.W.data, whole, rtol=0, atol=1e-12)


def test_subspaces_are_drawn_from_the_share_of_the_run_that_was_asked_for() -> None:
    """SVD before 0.5 of 20 updates, random from there on: at update 10 the very projector of seed and step."""
    trial = Trial(
        GoLore(GoLoreConfig(lora_rank=3, update_proj_gap=5, rand_ratio=0.5)), torch.zeros(9, 6), quadratic((9, 6)), 20
    )
    probes = []
    engine_probe = trial.engine.probe
    trial.engine.probe = lambda *args: probes.append(step) or engine_probe(*args)  # type: ignore[method-assign]
    for step in range(20):
        trial.update(step, batch_of(step), 0.05)
    assert probes == [0, 5]


def test_a_gradient_that_is_not_finite_keeps_the_projector_until_the_next_attempt() -> None:
    trial = Trial(GoLore(GoLoreConfig(lora_rank=3, update_proj_gap=2)), torch.zeros(9, 6), quadratic((9, 6)), 100)
    for step in range(2):
        trial.update(step, batch_of(step), 0.05)
    before = trial.module.A.detach().clone()
    trial.announce(2, torch.tensor(float("nan"), dtype=torch.float64))
    assert torch.equal(trial.module.A, before) and trial.method.counters()["projectors_kept"] == 1
    trial.ctx.micro_batches = [batch_of(2)]
    trial.method.retry(2, trial.ctx)
    assert not torch.equal(trial.module.A, before) and trial.method.counters()["projectors_kept"] == 0
    after = trial.module.A.detach().clone()
    trial.method.retry(2, trial.ctx)
    assert torch.equal(trial.module.A, after), "what has its projector is left alone"


# ---------------------------------------------------------------- the counter-example of the paper

SIZE, RANK, NOISE, GAP, UPDATES = 10, 4, 40.0, 20, 1200


def noisy(X: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """½|A X|² + <B, X>, A = [I 0], B = [D 0; 0 0], and noise in the last rows that has no mean: <±σ C, X>."""
    clean = SIZE - RANK
    return objective(X) + sign * NOISE * X[clean:, clean:].trace()


def objective(X: torch.Tensor) -> torch.Tensor:
    clean = SIZE - RANK
    return 0.5 * X[:clean].square().sum() + (best() * X[:clean, :clean]).sum()


def best() -> torch.Tensor:
    """D: the minimum is -½|D|², at X = -D."""
    size = SIZE - RANK
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def counter_example(rand_ratio: float) -> float:
    """The share of the possible decrease that a run reaches."""
    config = GoLoreConfig(lora_rank=RANK, update_proj_gap=GAP, rand_ratio=rand_ratio)
    trial = Trial(GoLore(config), torch.zeros(SIZE, SIZE), noisy, UPDATES)
    source = torch.Generator().manual_seed(3)
    for step in range(UPDATES):
        sign = 2.0 * torch.randint(0, 2, (), generator=source).double() - 1.0
        trial.update(step, sign, 0.05 * (1 - step / UPDATES))
    return float(objective(trial.module.whole().detach())) / float(-0.5 * best().square().sum())


def test_svd_stalls_where_random_subspaces_converge() -> None:
    """The noise is stronger than the gradient, so SVD projects on nothing else and learns nothing at all."""
    assert counter_example(1.0) < 0.01
    assert counter_example(0.25) > 0.8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_rank": 0}, "--lora-rank"),
        ({"proj_scale": 0.0}, "--proj-scale"),
        ({"update_proj_gap": 0}, "--update-proj-gap"),
        ({"rand_ratio": 1.5}, "--rand-ratio"),
        ({"rand_ratio": -0.1}, "--rand-ratio"),
        ({"probe_passes": 0}, "--probe-passes"),
    ],
)
def test_values_out_of_range_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GoLoreConfig(**flags).check()
