"""An engine without DeepSpeed: no data parallelism, whole tensors (or those of a tensor-parallel rank), any precision.

The reference that the sharded engines are tested against, and the way to study a method in a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from megalowrank.engine.arena import flatten_in_place, whole_partition
from megalowrank.engine.engine import StepResult, poison_if_not_finite
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.unsigned import unsigned
from megalowrank.lowrank.factors import LowRankFactors, factor_parameters
from megalowrank.lowrank.fold import Probed
from megalowrank.lowrank.probe import Take, probe_gradients
from megalowrank.lowrank.state import FlatForwardCopy, OptimizerStateView, Spread


def flat_forward_copy(factors: Sequence[torch.nn.Parameter], flat: torch.Tensor) -> FlatForwardCopy:
    """The forward copies of ``factors``, which are views of ``flat``."""
    base = flat.storage_offset()
    found = [p.data.storage_offset() - base if p.requires_grad else -1 for p in factors]
    offsets = np.array(found, dtype=np.int64)
    return FlatForwardCopy(flat, offsets)


class DenseEngine:
    """Plain training of ``module``; with bfloat16 parameters the masters are float32."""

    def __init__(
        self,
        module: torch.nn.Module,
        layers: Sequence[LowRankFactors],
        optimizer: VectorClockAdamW,
        clip_grad: float,
        spread: Spread | None = None,
    ) -> None:
        self.module, self.optimizer, self.group = module, optimizer, None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device, self._parameters = parameters[0].device, parameters
        self._low = parameters[0].dtype == torch.bfloat16
        partitions = []
        for group in optimizer.param_groups:
            own = group["params"]
            if self._low:
                group["params"] = [torch.nn.Parameter(p.detach().float()) for p in own]
            partitions.append(whole_partition(own, group["params"]))
        self._masters = [p for group in optimizer.param_groups for p in group["params"]]
        flat = flatten_in_place(parameters)[0] if self._low else partitions[0].master
        factors = factor_parameters(layers)
        forward = flat_forward_copy(factors, flat)
        self.state = OptimizerStateView(factors, partitions, forward, None, masters_sharded=False, spread=spread)
        optimizer.bind(partitions, self.state.clocks, factors)
        optimizer.guard, optimizer.clip_grad = True, clip_grad

    def train_step(self, micro_batches: Sequence[torch.Tensor], lr: float) -> StepResult:
        """One update; the gradient is the mean over micro-batches."""
        self.module.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = poison_if_not_finite(self.module(batch)) / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._low:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        if self._low:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                parameter.data.copy_(master.data)
        for parameter in self._parameters:
            parameter.grad = None
        norm = self.optimizer.grad_norm
        return StepResult(total, float("nan") if norm is None else norm, self.optimizer.step_applied)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean loss of micro-batches on this rank."""
        self.module.eval()
        losses = [self.module(batch) for batch in micro_batches]
        return torch.stack(losses).double().mean()

    def probe(self, micro_batches: Sequence[torch.Tensor], weights: Sequence[Probed], take: Take) -> int:
        """See ``Engine``."""
        self.module.train()
        return probe_gradients(self.module, micro_batches, weights, take)

    def unsigned(self) -> AbstractContextManager[None]:
        """See ``Engine``."""
        return unsigned(lambda: [p.data for p in self.module.parameters()], getattr(self.module, "embedding", None))

    def end_evaluation(self) -> None:
        """Nothing is gathered."""

    def reload(self) -> None:
        """Cut runs anew after a load."""
        self.optimizer.forget_runs()
