"""Process groups: the only reader of megatron-core's parallel_state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megalowrank.config import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """The groups a rank belongs to. ``data`` holds the ranks that hold the same part of the model."""

    data: Any
    data_rank: int
    data_size: int
    rank: int
    world: int

    def labels(self) -> dict[tuple[int, ...], str]:
        """Names of groups by their ranks, ascending; where two groups have the same ranks, the inner one's."""
        return {tuple(range(self.world)): "world", tuple(sorted(dist.get_process_group_ranks(self.data))): "data"}


def initialize_groups(config: ParallelConfig) -> Groups:
    """Build the process groups; every rank calls it, after torch.distributed is initialised.

    Idempotent in one process: a second call returns the groups that exist.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
        )
    group = parallel_state.get_data_parallel_group()
    return Groups(
        data=group,
        data_rank=dist.get_rank(group),
        data_size=dist.get_world_size(group),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
    )


def initialize_single_process(store_path: str) -> Groups:
    """Groups of one gloo process without a launcher (tools and dense tests); ``store_path`` is a file."""
    if not dist.is_initialized():
        store = dist.FileStore(store_path, 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    return initialize_groups(ParallelConfig())
