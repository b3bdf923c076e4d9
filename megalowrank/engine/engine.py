"""What the training loop knows of an engine, and what an engine gives back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megalowrank.lowrank.fold import Probed
from megalowrank.lowrank.probe import Take
from megalowrank.lowrank.state import OptimizerStateView


@dataclass(frozen=True)
class StepResult:
    """One update: mean loss over ranks and micro-batches (scalar), global gradient norm, whether it was applied.

    Loss and norm may be tensors on the device: reading them waits for it, so that only log lines should.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor | float
    applied: bool


class Engine(Protocol):
    """An engine runs steps and owns sharded state. Every rank calls every method alike."""

    state: OptimizerStateView
    group: Any
    device: torch.device

    def train_step(self, micro_batches: Sequence[torch.Tensor], lr: float) -> StepResult:
        """Forward and backward of all micro-batches [b, S + 1], one update at learning rate ``lr``."""

    def eval_step(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean loss of micro-batches [b, S + 1] without gradients, a scalar on this rank.

        Averaged over data-parallel ranks, by the caller, it is that of all; a pipeline has done so already.
        """

    def probe(self, micro_batches: Sequence[torch.Tensor], weights: Sequence[Probed], take: Take) -> int:
        """Give the full gradients of frozen ``weights`` of this rank to ``take(i, gradient)``, see ``Probe``.

        Each is the mean over ``micro_batches`` [b, S + 1] of this rank; gradients, optimizer, schedule and random
        generators stay as they were. Stages of a pipeline may ask for different numbers of weights. Returns the bytes
        of gradients held at the peak.
        """

    def unsigned(self) -> AbstractContextManager[None]:
        """While entered, forward passes see absolute weights and word embeddings of ones; masters stay as they are.

        Everything comes back bit for bit.
        """

    def end_evaluation(self) -> None:
        """Called after the last ``eval_step`` of an evaluation."""

    def reload(self) -> None:
        """Make the engine consistent after weights, masters or moments were written from outside."""


def poison_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, multiplied by NaN where it is not finite.

    Every gradient of this rank then is NaN, and the one check on the global gradient norm, which all
    ranks share, covers the loss too; nothing waits for the host.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
