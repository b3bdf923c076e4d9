"""Everything that can be said about a run before it starts: what the start-up table and ``tools/estimate.py`` print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters, RefreshPlan
from megalowrank.models.accounting.flops import flops_per_token
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.memory import Bytes, predicted_bytes
from megalowrank.models.accounting.parameters import ParameterCount, count_parameters
from megalowrank.models.accounting.parts import rank_parts
from megalowrank.models.accounting.pipeline import Pipeline, pipeline_of
from megalowrank.models.accounting.refresh import Refresh, refresh_of
from megalowrank.models.accounting.tally import Volumes
from megalowrank.models.accounting.wire import Crossing, Reads, wire_bytes


@dataclass(frozen=True)
class StageEstimate:
    """A rank of one pipeline stage: its blocks [first, stop), parameters with padding, bytes and collectives."""

    blocks: tuple[int, int]
    parameters: int
    memory: dict[str, Bytes]
    wire: Volumes
    refresh: Refresh | None = None

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(size.device for size in self.memory.values())

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return sum(size.host for size in self.memory.values())

    @property
    def sent(self) -> int:
        """Bytes of all collectives of an update."""
        return sum(volume.payload for volume in self.wire.values())


@dataclass(frozen=True)
class Estimate:
    """The whole model, and a rank of every stage. ``flops_per_token`` as MFU counts them, without recomputation."""

    layout: Layout
    count: ParameterCount
    flops_per_token: float
    stages: tuple[StageEstimate, ...]
    pipeline: Pipeline

    @property
    def dearest(self) -> int:
        """The stage whose ranks hold most on the device."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].device)

    @property
    def tokens(self) -> int:
        """Tokens of an update over all ranks."""
        return self.layout.tokens * self.layout.accumulation * self.layout.data_size

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; bytes, elements, FLOPs."""
        return {
            "layout": {**asdict(self.layout), "schedules": dict(self.layout.schedules), "world": self.layout.world},
            "parameters": asdict(self.count),
            "tokens_per_update": self.tokens,
            "flops_per_token": self.flops_per_token,
            "pipeline_bubble": self.pipeline.bubble,
            "stages": [self._stage(number) for number in range(len(self.stages))],
        }

    def _stage(self, number: int) -> dict[str, Any]:
        stage = self.stages[number]
        return {
            "blocks": list(stage.blocks),
            "parameters": stage.parameters,
            "memory": {name: asdict(size) for name, size in stage.memory.items()},
            "device_bytes": stage.device,
            "host_bytes": stage.host,
            "collectives": [
                {"group": group, "collective": name, "calls": volume.calls, "bytes": volume.payload}
                for (group, name), volume in sorted(stage.wire.items())
            ],
            "refresh": None if stage.refresh is None else stage.refresh.as_json(),
            "flops": self.pipeline.flops[number],
            "idle": self.pipeline.idle[number],
        }


def estimate(
    config: ModelConfig,
    adapters: Adapters | None,
    layout: Layout,
    reads: Reads | None = None,
    crossing: Crossing | None = None,
    plan: RefreshPlan | None = None,
) -> Estimate:
    """Predict a run; ``reads`` and ``crossing`` as of ``wire_bytes``, ``plan`` as of ``refresh_of``.

    Raises ConfigError for bad patterns, and for more stages than blocks.
    """
    stages = []
    for number in range(layout.pipe_size):
        blocks = stage_blocks(config, adapters, layout, number)
        stages.append(
            StageEstimate(
                (blocks.start, blocks.stop),
                sum(part.numel for part in rank_parts(config, adapters, layout, number)),
                predicted_bytes(config, adapters, layout, number),
                wire_bytes(config, adapters, layout, number, reads, crossing),
                None if plan is None else refresh_of(config, adapters, layout, plan, number),
            )
        )
    per_token = flops_per_token(config, adapters, layout.seq_length)
    count = count_parameters(config, adapters)
    return Estimate(layout, count, per_token, tuple(stages), pipeline_of(config, adapters, layout))
