"""DeepSpeed ZeRO 0 to 3 behind the ``Engine`` protocol."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from megalowrank.engine import zero_state
from megalowrank.engine.engine import StepResult, poison_if_not_finite
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.partial import NormOverRanks, PartialGradients, SharedGradients
from megalowrank.engine.unsigned import unsigned
from megalowrank.lowrank.factors import LowRankFactors, factor_parameters, factor_places, frozen_tensors
from megalowrank.lowrank.fold import Probed
from megalowrank.lowrank.pool import HostAllocator
from megalowrank.lowrank.probe import Take, probe_gradients
from megalowrank.lowrank.state import OptimizerStateView, Spread
from megalowrank.parallel.collectives import mean_over
from megalowrank.parallel.groups import Groups, ModelParallelUnit
from megalowrank.parallel.heads import Heads, join_heads
from megalowrank.parallel.wire import partial_parameters, shared_parameters


def initialize_distributed(timeout: Any, heads: int = 1) -> Heads | None:
    """Join the job's process group, or that of one of ``heads``; every rank calls it after the launcher variables.

    On the CPU DeepSpeed would compile a shared-memory operator here; gloo does without.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # collectives of ours come before DeepSpeed sets it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    joined = None if heads == 1 else join_heads(heads, get_accelerator().communication_backend_name(), timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    return joined


def host_allocator(pin: bool) -> HostAllocator:
    """Host buffers from DeepSpeed's accelerator: page-locked if ``pin`` and where that means something."""

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty(numel, dtype=dtype)
        return get_accelerator().pin_memory(buffer) if pin and numel else buffer

    return allocate


def is_plain(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed leaves the client optimizer as it is: ZeRO-0 in float32."""
    return config["zero_optimization"]["stage"] == 0 and not config.get("bf16", {}).get("enabled", False)


def bind_state(
    engine: Any,
    module: torch.nn.Module,
    layers: Sequence[LowRankFactors],
    optimizer: VectorClockAdamW,
    groups: Groups,
) -> tuple[zero_state.ZeroLayout, OptimizerStateView]:
    """Find masters, moments and weights in an initialised DeepSpeed engine and tie optimizer and folds to them."""
    factors = factor_parameters(layers)
    layout = zero_state.zero_layout(engine, factors)
    spread = Spread(factor_places(layers, groups.tensor_rank), groups.tensor, groups.pipe)
    state = OptimizerStateView(factors, layout.partitions, layout.forward, groups.data, layout.masters_sharded, spread)
    for frozen in (*frozen_tensors(layers), *getattr(module, "frozen", ())):
        frozen.bind(zero_state.weight_locator(frozen.parameter))
    optimizer.bind(layout.partitions, state.clocks, factors)
    return layout, state


def complete_gradients(module: torch.nn.Module, config: dict[str, Any], groups: Groups) -> list[PartialGradients]:
    """Have gradients that layers leave partial reduced over tensor-parallel ranks, and shared ones over heads."""
    zero = config["zero_optimization"]
    per_update = zero["stage"] == 0 or (zero["stage"] == 1 and not zero.get("overlap_comm", False))
    passes = config.get("gradient_accumulation_steps", 1)
    found = [PartialGradients(partial_parameters(module), groups.tensor, passes, per_update)]
    if groups.heads is not None:
        found.append(SharedGradients(shared_parameters(module), groups.heads, passes, per_update))
    return found


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
        self.group, self.optimizer, self.groups = groups.data, optimizer, groups
        clip = config.get("gradient_clipping", 0.0)
        plain = is_plain(config)
        settings = {"log_level": "error", **config, "gradient_clipping": 0.0 if plain else clip}
        zero_state.forget_model_parallelism()
        mpu = ModelParallelUnit() if groups.tensor_size > 1 else None
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=mpu)
        self.module = self.deepspeed.module
        self.device = torch.device(self.deepspeed.device)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.layout, self.state = bind_state(self.deepspeed, module, layers, optimizer, groups)
        optimizer.guard, optimizer.clip_grad = plain, clip if plain else 0.0
        if groups.tensor_size > 1:
            optimizer.norm_over = NormOverRanks(groups.tensor)
        self.completed = complete_gradients(module, config, groups)

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
    def eval_step(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean loss of micro-batches on this rank."""
        self.deepspeed.eval()
        losses = [self.deepspeed(batch.to(self.device, non_blocking=True)) for batch in micro_batches]
        return torch.stack(losses).double().mean()

    def probe(self, micro_batches: Sequence[torch.Tensor], weights: Sequence[Probed], take: Take) -> int:
        """See ``Engine``. It goes round DeepSpeed's own forward pass, whose hooks would begin a reduction."""
        self.deepspeed.train()
        batches = [batch.to(self.device, non_blocking=True) for batch in micro_batches]
        peak = probe_gradients(self.module, batches, weights, take)
        zero_state.release_gathered(self.deepspeed)
        return peak

    def unsigned(self) -> AbstractContextManager[None]:
        """See ``Engine``."""
        return unsigned(lambda: zero_state.forward_tensors(self.module), getattr(self.module, "embedding", None))

    def end_evaluation(self) -> None:
        """Give back what the forward passes of an evaluation gathered."""
        zero_state.release_gathered(self.deepspeed)

    def reload(self) -> None:
        """Bring forward copies and the optimizer in line with masters, moments and clocks that were loaded."""
        zero_state.refresh_forward(self.deepspeed, self.layout, self.parameters)
        self.optimizer.forget_runs()

    def close(self) -> None:
        """Remove hooks, so that another engine can be built in this process."""
        for gradients in self.completed:
            gradients.close()
        self.deepspeed.destroy()
