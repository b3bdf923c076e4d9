"""DeepSpeed ZeRO 0 to 3 behind the ``Engine`` protocol."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from megalowrank.engine import zero_state
from megalowrank.engine.dense import factor_parameters
from megalowrank.engine.engine import StepResult, poison_if_not_finite
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.lowrank.factors import LowRankFactors, folded_weights
from megalowrank.lowrank.pool import HostAllocator
from megalowrank.lowrank.state import OptimizerStateView
from megalowrank.parallel.collectives import mean_over
from megalowrank.parallel.groups import Groups


def initialize_distributed(timeout: Any) -> None:
    """Join the job's process group; every rank calls it after the launcher variables are set.

    On the CPU DeepSpeed would compile a shared-memory operator here; gloo does without.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def host_allocator(pin: bool) -> HostAllocator:
    """Host buffers from DeepSpeed's accelerator: page-locked if ``pin`` and where that means something."""

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty(numel, dtype=dtype)
        return get_accelerator().pin_memory(buffer) if pin and numel else buffer

    return allocate


class ZeroEngine:
    """A DeepSpeed engine whose state is reachable through ``state``.

    ``config`` is the resolved DeepSpeed configuration. Collective: every rank builds it with the same
    model. The gradient is the mean over data-parallel ranks and micro-batches.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        layers: Sequence[LowRankFactors],
        optimizer: VectorClockAdamW,
        config: dict[str, Any],
        groups: Groups,
    ) -> None:
        self.group, self.optimizer = groups.data, optimizer
        clip = config.get("gradient_clipping", 0.0)
        plain = config["zero_optimization"]["stage"] == 0 and not config.get("bf16", {}).get("enabled", False)
        settings = {"log_level": "error", **config, "gradient_clipping": 0.0 if plain else clip}
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = self.deepspeed.module
        self.device = torch.device(self.deepspeed.device)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        factors = factor_parameters(layers)
        self.layout = zero_state.zero_layout(self.deepspeed, factors)
        self.state = OptimizerStateView(
            factors, self.layout.partitions, self.layout.forward, self.group, self.layout.masters_sharded
        )
        for folded in folded_weights(layers):
            folded.bind(zero_state.weight_locator(folded.parameter))
        optimizer.bind(self.layout.partitions, self.state.clocks, factors)
        optimizer.guard, optimizer.clip_grad = plain, clip if plain else 0.0

    def train_step(self, micro_batches: Sequence[torch.Tensor], lr: float) -> StepResult:
        """One update at learning rate ``lr``; a non-finite loss or gradient skips it on all ranks."""
        self.deepspeed.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, batch in enumerate(micro_batches):
            loss = poison_if_not_finite(self.deepspeed(batch.to(self.device, non_blocking=True)))
            self.deepspeed.backward(loss)
            total += loss.detach()
            if index + 1 == len(micro_batches):
                mean_over(total.div_(len(micro_batches)), self.group)
            self.deepspeed.step()
        applied = zero_state.step_was_applied(self.deepspeed)
        return StepResult(total, zero_state.global_grad_norm(self.deepspeed), applied)

    @torch.no_grad()
    def eval_step(self, micro_batch: torch.Tensor) -> torch.Tensor:
        """Mean loss of one micro-batch on this rank."""
        self.deepspeed.eval()
        return self.deepspeed(micro_batch.to(self.device, non_blocking=True))

    def end_evaluation(self) -> None:
        """Give back what the forward passes of an evaluation gathered."""
        zero_state.release_gathered(self.deepspeed)

    def reload(self) -> None:
        """Bring forward copies and the optimizer in line with masters, moments and clocks that were loaded."""
        zero_state.refresh_forward(self.deepspeed, self.layout, self.parameters)
        self.optimizer.forget_runs()

    def close(self) -> None:
        """Remove DeepSpeed's hooks, so that another engine can be built in this process."""
        self.deepspeed.destroy()
