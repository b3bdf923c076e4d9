"""DeepSpeed's pipeline engine, with ZeRO-1 inside each stage, behind the ``Engine`` protocol.

Every stage is one layer for DeepSpeed: our own ``Transformer`` part, cut by cost before the engine sees it. A tied
embedding is the one parameter that two stages share; DeepSpeed adds up its gradients (``TiedLayerSpec``).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megalowrank.engine import zero_state
from megalowrank.engine.engine import StepResult, poison_if_not_finite
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.unsigned import unsigned
from megalowrank.engine.zero import bind_state, complete_gradients
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.fold import Probed
from megalowrank.lowrank.probe import Probe, Take
from megalowrank.models.transformer import Transformer
from megalowrank.parallel.groups import Groups


class Stage(torch.nn.Module):
    """One pipeline stage as DeepSpeed sees it; DeepSpeed finds the stages by the name of this class."""

    def __init__(self, part: Transformer, tied: bool) -> None:
        super().__init__()
        self.part = part
        self.embeds = part.place.begins and not tied
        self.projects = part.place.ends and not tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, S] or hidden [S, B, H] -> hidden, or logits on the last stage (unless the head is tied)."""
        if self.embeds:
            x = self.part.embedding(x)
        x = self.part.run_blocks(self.part.add_positions(x))
        if self.part.norm is not None:
            x = self.part.norm(x)
        return self.part.output(x)[0] if self.projects else x


class TiedTable(torch.nn.Module):
    """The word embedding of the first stage and of the last, which must stay equal."""

    def __init__(self, part: Transformer) -> None:
        super().__init__()
        self.table = part.embedding

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, H]."""
        return self.table(tokens_BS)


def pipeline_module(part: Transformer, tied: bool, groups: Groups) -> PipelineModule:
    """This rank's stage as a module of DeepSpeed's. Collective: every rank of the job calls it."""
    stages = [LayerSpec(Stage, None, tied) for _ in range(groups.pipe_size)]
    stages[groups.pipe_rank] = Stage(part, tied)
    layers = stages
    if tied:
        first = TiedLayerSpec("table", TiedTable, part, tied_weight_attr="table.weight")
        last = TiedLayerSpec(
            "table", TiedTable, part, tied_weight_attr="table.weight", forward_fn=lambda _, x: part.output(x)[0]
        )
        layers = [first, *stages, last]
    topology = PipeModelDataParallelTopology(
        num_pp=groups.pipe_size, num_mp=groups.tensor_size, num_dp=groups.data_size
    )

    def loss(logits_SBV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return poison_if_not_finite(part.loss(logits_SBV, labels_BS))

    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="type:Stage")


class PipelineEngine:
    """As ``ZeroEngine``, for a model whose blocks are divided over the stages of a pipeline.

    ``part`` is this stage's part of the model. The step of all micro-batches, forward, backward and optimizer, is one
    call into DeepSpeed (1F1B).
    """

    def __init__(
        self,
        part: Transformer,
        layers: Sequence[LowRankFactors],
        optimizer: VectorClockAdamW,
        config: dict[str, Any],
        groups: Groups,
        tied: bool,
    ) -> None:
        self.group, self.optimizer, self.groups = groups.data, optimizer, groups
        whole = {"pipe_partitioned": False, "grad_partitioned": False}
        settings = {"log_level": "error", **config, "pipeline": {**config.get("pipeline", {}), **whole}}
        model = pipeline_module(part, tied, groups)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.module = part
        self.device = torch.device(self.deepspeed.device)
        self.parameters = [p for p in part.parameters() if p.requires_grad]
        self.layout, self.state = bind_state(self.deepspeed, part, layers, optimizer, groups)
        self.completed = complete_gradients(part, config, groups)
        self._has_data = part.place.begins or part.place.ends
        self._shape: torch.Size | None = None

    def train_step(self, micro_batches: Sequence[torch.Tensor], lr: float) -> StepResult:
        """One update at learning rate ``lr``; a non-finite loss or gradient skips it on all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.deepspeed.train_batch(self._pairs(micro_batches))
        applied = zero_state.step_was_applied(self.deepspeed)
        return StepResult(loss, zero_state.global_grad_norm(self.deepspeed), applied)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean loss of micro-batches over data-parallel ranks, on every stage."""
        count = len(micro_batches)
        return self.deepspeed.eval_batch(self._pairs(micro_batches), num_micro_batches=count).reshape(())

    def probe(self, micro_batches: Sequence[torch.Tensor], weights: Sequence[Probed], take: Take) -> int:
        """See ``Engine``; all micro-batches go through the stages as in a step."""
        self.deepspeed.module.train()
        self.deepspeed.set_dataiterator(self._pairs(micro_batches))
        with Probe(weights, len(micro_batches), take) as probe, torch.enable_grad():
            zero_state.probe_pipeline(self.deepspeed, len(micro_batches), probe)
        return probe.peak

    def _pairs(self, micro_batches: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]] | None:
        """Inputs and labels [B, S], for the stages that load them.

        Stages receive into buffers of the last shape, which are given up where it changes.
        """
        if self._shape not in (None, micro_batches[0].shape):
            self.deepspeed.reset_activation_shape()
        self._shape = micro_batches[0].shape
        if not self._has_data:
            return None
        parted = (self.module.parted(batch) for batch in micro_batches)
        return iter([(inputs.contiguous(), labels.contiguous()) for inputs, labels in parted])

    def unsigned(self) -> contextlib.AbstractContextManager[None]:
        """See ``Engine``."""
        return unsigned(lambda: zero_state.forward_tensors(self.module), self.module.embedding)

    def end_evaluation(self) -> None:
        """Nothing is gathered."""

    def reload(self) -> None:
        """Bring forward copies and the optimizer in line with masters, moments and clocks that were loaded."""
        zero_state.refresh_forward(self.deepspeed, self.layout, self.parameters)
        self.optimizer.forget_runs()

    def close(self) -> None:
        """Remove hooks, so that another engine can be built in this process."""
        for gradients in self.completed:
            gradients.close()
        self.deepspeed.destroy()
