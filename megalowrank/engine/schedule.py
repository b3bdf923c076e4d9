"""Learning rate as a pure function of the update index."""

from __future__ import annotations

import math

from megalowrank.config import TrainConfig


def learning_rate(step: int, lr: float, config: TrainConfig) -> float:
    """Learning rate of 0-based update ``step``: linear warm-up from 0, then decay to ``min_lr``.

    The decay ends at ``lr_decay_iters``; afterwards the rate stays at ``min_lr`` (constant: at ``lr``).
    """
    end = config.lr_decay_iters or config.train_iters
    if step < config.lr_warmup_iters:
        return lr * step / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return lr
    share = min((step - config.lr_warmup_iters) / max(1, end - config.lr_warmup_iters), 1.0)
    height = 1.0 - share if config.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return config.min_lr + (lr - config.min_lr) * height
