"""Learning rate as a pure function of the update index."""

from __future__ import annotations

import math
from dataclasses import replace

from megalowrank.config import TrainConfig
from megalowrank.errors import ConfigError

RESTARTS = "cosine_restarts"


def learning_rate(step: int, lr: float, config: TrainConfig) -> float:
    """Learning rate of 0-based update ``step``: linear warm-up from 0, then decay to ``min_lr``.

    The decay ends at ``lr_decay_iters``; afterwards the rate stays at ``min_lr`` (constant: at ``lr``).
    ``cosine_restarts`` is one cosine over the whole run that drops to 0 every ``lr_restart_interval`` updates and
    climbs back in a straight line; ``with_restarts`` has to have filled the interval (ReLoRA, section 3).
    """
    end = config.lr_decay_iters or config.train_iters
    if step < config.lr_warmup_iters:
        return lr * step / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return lr
    if config.lr_decay_style == RESTARTS and step < end:
        return _jagged(step + config.lr_restart_offset, lr, config, end)
    share = min((step - config.lr_warmup_iters) / max(1, end - config.lr_warmup_iters), 1.0)
    height = 1.0 - share if config.lr_decay_style == "linear" else _cosine(share)
    return config.min_lr + (lr - config.min_lr) * height


def _jagged(shifted: int, lr: float, config: TrainConfig, end: int) -> float:
    """The cosine, or after a restart the straight line from 0 to its value where the line ends."""
    interval, climb = config.lr_restart_interval or end, config.lr_restart_warmup_iters
    place = shifted % interval
    climbing = shifted >= interval and place < climb
    time = shifted - place + climb if climbing else shifted
    share = (time - config.lr_warmup_iters) / max(1, end - config.lr_warmup_iters)
    height = config.min_lr + (lr - config.min_lr) * _cosine(share)
    return height * place / climb if climbing else height


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


def with_restarts(config: TrainConfig, method_interval: int | None) -> TrainConfig:
    """``config`` with the interval of restarts filled, by default that of the method.

    Raises ConfigError if there is none, if restarts and warm-ups do not fit, or if flags would have no effect.
    """
    if config.lr_decay_style != RESTARTS:
        offset = "lr_restart_offset" if method_interval is None else "lr_restart_interval"
        for name in ("lr_restart_interval", "lr_restart_warmup_iters", offset):
            if getattr(config, name):
                raise ConfigError(f"--{name.replace('_', '-')} has no effect without --lr-decay-style {RESTARTS}")
        return config
    interval = config.lr_restart_interval or method_interval
    if interval is None:
        raise ConfigError(f"--lr-decay-style {RESTARTS} needs --lr-restart-interval: the method has no interval")
    end = config.lr_decay_iters or config.train_iters
    if config.lr_restart_offset + config.lr_warmup_iters > min(interval, end):
        raise ConfigError(
            "--lr-restart-offset and --lr-warmup-iters together are longer than the time to the first restart",
            f"{config.lr_restart_offset} + {config.lr_warmup_iters}",
            f"<= {min(interval, end)}",
        )
    if config.lr_restart_warmup_iters >= interval:
        raise ConfigError(
            "--lr-restart-warmup-iters is not shorter than --lr-restart-interval",
            config.lr_restart_warmup_iters,
            f"< {interval}",
        )
    return replace(config, lr_restart_interval=interval)


def restart_warnings(config: TrainConfig, method_interval: int | None) -> list[str]:
    """What a user should know of a method that restarts every ``method_interval`` updates under this schedule."""
    if method_interval is None:
        return []
    if method_interval + 1 - config.lr_restart_offset >= config.train_iters:
        return [f"the method never restarts: its interval is {method_interval} of --train-iters {config.train_iters}"]
    if config.lr_decay_style != RESTARTS:
        return [
            f"the method restarts every {method_interval} updates and the learning rate does not: updates after a "
            f"restart may be too large (--lr-decay-style {RESTARTS} climbs from 0)"
        ]
    return []
