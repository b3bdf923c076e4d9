"""Learning rates against figures of the reference and against torch's own schedulers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megalowrank.config import TrainConfig
from megalowrank.engine.schedule import learning_rate, restart_warnings, with_restarts
from megalowrank.errors import ConfigError

JAGGED = TrainConfig(
    train_iters=400, lr_decay_style="cosine_restarts", lr_warmup_iters=20, lr_restart_interval=100,
    lr_restart_warmup_iters=10, min_lr=0.1,
)  # fmt: skip


def rate(step: int, **changes: Any) -> float:
    return learning_rate(step, 1.0, with_restarts(replace(JAGGED, **changes), None))


def test_restarts_at_the_reference_s_figures() -> None:
    """Recorded from the public implementation: 400 updates, warm-up 20, restarts every 100 with 10 of climb."""
    steps = (0, 1, 19, 20, 99, 100, 101, 109, 110, 200, 205, 399)
    figures = (0, 0.05, 0.95, 1, 0.9074, 0, 0.0881, 0.793, 0.8811, 0, 0.275, 0.1)
    assert [rate(step) for step in steps] == pytest.approx(figures, abs=6e-5)


def test_an_offset_moves_every_restart_and_the_first_climbs_too() -> None:
    """The reference leaves out the climb of the first restart, at update 100 - 30."""
    assert rate(70, lr_restart_offset=30) == 0.0
    assert rate(71, lr_restart_offset=30) == pytest.approx(0.1 * rate(110))
    zeros = [step for step in range(1, 400) if rate(step, lr_restart_offset=30) == 0.0]
    assert zeros == [70, 170, 270, 370]
    assert rate(19, lr_restart_offset=30) == 0.95 and rate(50, lr_restart_offset=30) == rate(80)


def test_after_the_decay_nothing_restarts() -> None:
    ended = {"train_iters": 600, "lr_decay_iters": 400}
    assert [rate(step, **ended) for step in range(400)] == [rate(step) for step in range(400)]
    assert {rate(step, **ended) for step in range(400, 600)} == {0.1}


def test_without_a_climb_it_is_one_cosine() -> None:
    smooth = replace(JAGGED, lr_decay_style="cosine", lr_restart_interval=None, lr_restart_warmup_iters=0)
    steps = range(400)
    assert [rate(s, lr_restart_warmup_iters=0) for s in steps] == [learning_rate(s, 1.0, smooth) for s in steps]


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_decay_is_torch_s(style: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    schedulers = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.5),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5 / 3.0, 50),
    }
    scheduler = schedulers[style]()
    config = TrainConfig(train_iters=50, lr_decay_style=style, min_lr=0.5)
    for step in range(50):
        assert learning_rate(step, 3.0, config) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert learning_rate(90, 3.0, config) == 0.5


def test_the_interval_of_the_method_is_the_default() -> None:
    plain = replace(JAGGED, lr_restart_interval=None)
    assert with_restarts(plain, 50).lr_restart_interval == 50
    assert with_restarts(JAGGED, 50).lr_restart_interval == 100
    assert (
        with_restarts(replace(plain, lr_decay_style="cosine", lr_restart_warmup_iters=0), 50).lr_restart_interval
        is None
    )


def test_restarts_that_never_come_or_come_alone_are_said_aloud() -> None:
    assert restart_warnings(JAGGED, None) == restart_warnings(JAGGED, 100) == []
    assert "never restarts" in restart_warnings(JAGGED, 400)[0] and restart_warnings(JAGGED, 398) == []
    smooth = replace(JAGGED, lr_decay_style="cosine", lr_restart_interval=None, lr_restart_warmup_iters=0)
    assert "the learning rate does not" in restart_warnings(smooth, 100)[0]


@pytest.mark.parametrize(
    ("changes", "interval", "words"),
    [({"lr_restart_interval": None}, None, "needs --lr-restart-interval"),
     ({"lr_decay_style": "cosine"}, 100, "--lr-restart-interval has no effect"),
     ({"lr_decay_style": "cosine", "lr_restart_interval": None}, 100, "--lr-restart-warmup-iters has no effect"),
     ({"lr_decay_style": "linear", "lr_restart_interval": None, "lr_restart_warmup_iters": 0, "lr_restart_offset": 3},
      None, "--lr-restart-offset has no effect"),
     ({"lr_restart_offset": 81}, None, "together are longer"),
     ({"lr_warmup_iters": 101}, None, "together are longer"),
     ({"lr_restart_warmup_iters": 100}, None, "not shorter than --lr-restart-interval")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], interval: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_restarts(replace(JAGGED, **changes), interval)
