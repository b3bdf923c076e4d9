"""What a run prints before its first step and after its last."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine import memory
from megalowrank.engine.corpus import Corpus
from megalowrank.engine.dsconfig import Resolved
from megalowrank.engine.loop import Position
from megalowrank.engine.pipeline import PipelineEngine
from megalowrank.engine.plan import layout_of, reads_of
from megalowrank.engine.zero import ZeroEngine
from megalowrank.methods.base import Method
from megalowrank.models.accounting.estimate import estimate
from megalowrank.models.accounting.flops import peak_flops
from megalowrank.models.accounting.table import human, startup_table, summary
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import Groups


class Report:
    """Tables of one run, printed by the first rank; FLOPs for the log lines of every rank."""

    def __init__(
        self,
        config: ModelConfig,
        train: TrainConfig,
        model: BuiltModel,
        engine: ZeroEngine | PipelineEngine,
        method: Method,
        resolved: Resolved,
        groups: Groups,
    ) -> None:
        self.config, self.train, self.model = config, train, model
        self.engine, self.method, self.groups, self.resolved = engine, method, groups, resolved
        parallel = ParallelConfig(groups.tensor_size, groups.pipe_size, groups.sequence)
        layout = layout_of(config, parallel, resolved, method, groups.data_size, engine.device.type != "cpu")
        built = {name: "ride" if ride else "partial" for name, ride in model.module.place.ride.items()}
        layout = replace(layout, schedules=built)
        plans = reads_of(method), method.between_heads, method.refresh_plan()
        self.estimate = estimate(config, method.adapters(), layout, *plans)
        self.flops_per_token = self.estimate.flops_per_token
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        self.peak_flops = peak_flops(name)

    def current_memory(self) -> int:
        """Bytes held now on this rank."""
        return memory.current_memory(self.engine.device)

    def start(self, corpus: Corpus, position: Position) -> str:
        """Parameters, bytes, batch and data of the run, and warnings."""
        resolved, train = self.resolved, self.train
        lines = [startup_table(self.estimate), ""]
        precision = "bfloat16 with float32 masters" if train.bf16 else "float32"
        lines.append(
            f"method {train.method}, ZeRO-{resolved.stage}, {precision}, "
            f"{self.groups.world} rank(s) on {self.engine.device.type}"
        )
        heads = "" if self.groups.heads is None else f"{self.groups.heads.count} heads x "
        if self.groups.world > self.groups.data_size:
            split = " with sequence parallelism" if self.groups.sequence else ""
            lines.append(
                f"{heads}tensor-parallel size {self.groups.tensor_size}{split} x "
                f"pipeline stages {self.groups.pipe_size} x data-parallel size {self.groups.data_size}"
            )
        lines.append(
            f"global batch {resolved.global_batch_size} = micro-batch {resolved.micro_batch_size} x accumulation "
            f"{resolved.accumulation} x {heads}data-parallel size {self.groups.data_size}; "
            f"{resolved.global_batch_size * train.seq_length:,} tokens per update, "
            f"{self.flops_per_token / 1e6:.1f} MFLOP per token"
        )
        lines += summary(self.estimate)
        if position.step:
            lines.append(f"resumed at update {position.step} ({position.skipped} skipped so far)")
        if corpus.task is not None:
            lines += [corpus.task.describe(), *(f"note: {note}" for note in corpus.task.notes)]
        if corpus.unigram_loss is not None:
            lines.append(f"unigram model of the same tokens: held-out {self._loss(corpus.unigram_loss, corpus)}")
        lines += [f"warning: {warning}" for warning in self.model.warnings]
        return "\n".join(lines)

    def end(self, evaluation: dict[str, Any], corpus: Corpus) -> str:
        """Predicted against measured memory, and the last evaluation against the unigram model."""
        predicted = self.estimate.stages[self.groups.pipe_rank].memory
        measured = memory.measured_bytes(self.engine, self.method, self.model.layers)
        lines = [*memory.memory_report(predicted, measured)]
        lines.append(f"{'peak of the process':<24}{human(memory.peak_memory(self.engine.device)):>28}")
        if corpus.task is not None:
            measures = {name: value for name, value in evaluation.items() if name != "step"}
            lines += ["", *(f"{name:<36}{value:>16.4f}" for name, value in measures.items())]
        elif "eval_loss" in evaluation:
            lines += ["", f"held-out loss:  {self._loss(evaluation['eval_loss'], corpus)}"]
            if corpus.unigram_loss is not None:
                lines.append(f"unigram model:  {self._loss(corpus.unigram_loss, corpus)}")
        return "\n".join(lines)

    def _loss(self, loss: float, corpus: Corpus) -> str:
        text = f"{loss:.4f} nats per token"
        if corpus.bytes_per_token is not None:
            text += f", {loss / math.log(2) / corpus.bytes_per_token:.4f} bits per byte"
        return text
