"""Process groups: the only reader of megatron-core's parallel_state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megalowrank.config import ParallelConfig
from megalowrank.errors import ConfigError
from megalowrank.parallel.heads import Heads
from megalowrank.parallel.wire import Wire


@dataclass(frozen=True)
class Groups:
    """The groups a rank belongs to, with its place in each.

    ``data`` holds the ranks that hold the same part of the model, ``tensor`` those that share every layer of a
    pipeline stage, ``pipe`` one rank of every stage, ``model`` the ranks of both, ``stage`` all of this stage,
    ``everyone`` the job, in which this rank is ``rank`` of ``world``. Ranks count tensor-parallel ranks fastest, then
    data-parallel ones, stages and ``heads``, the groups of ranks that train apart; all other groups are inside a head.
    """

    data: Any
    data_rank: int
    data_size: int
    tensor: Any
    tensor_rank: int
    tensor_size: int
    pipe: Any
    pipe_rank: int
    pipe_size: int
    model: Any
    stage: Any
    everyone: Any
    rank: int
    world: int
    sequence: bool = False
    heads: Heads | None = None

    def labels(self) -> dict[tuple[int, ...], str]:
        """Names of groups by their ranks, ascending; where two groups have the same ranks, the inner one's."""
        known = {
            "world": dist.group.WORLD, "model": self.model, "stage": self.stage, "pipe": self.pipe, "data": self.data,
            "tensor": self.tensor,
        }  # fmt: skip
        return {tuple(sorted(dist.get_process_group_ranks(group))): name for name, group in known.items()}

    def wire(self) -> Wire:
        """What the linears of this rank talk over."""
        return Wire(self.tensor, self.tensor_rank, self.tensor_size, self.sequence)

    @property
    def head(self) -> int:
        """The head that this rank belongs to."""
        return 0 if self.heads is None else self.heads.head

    @property
    def stream(self) -> tuple[int, int]:
        """Which part of every batch this rank reads, and how many there are: data-parallel ranks of all heads."""
        count = 1 if self.heads is None else self.heads.count
        return self.head * self.data_size + self.data_rank, count * self.data_size

    @property
    def first_of_data(self) -> bool:
        """Whether this rank is the first of its replicas."""
        return self.data_rank == 0


class ModelParallelUnit:
    """What DeepSpeed asks of an ``mpu``, answered by megatron-core.

    It must not have ``initialize_sequence_parallel``: ZeRO would take that for another kind of parallelism.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())

    def get_pipe_parallel_group(self) -> Any:
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipe_parallel_world_size(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()


def data_parallel_size(config: ParallelConfig, world: int) -> int:
    """Ranks that hold the same part of the model, of ``world`` in a head; ConfigError if the sizes do not divide it."""
    tensor, pipe = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world % (tensor * pipe):
        raise ConfigError(
            "--tensor-model-parallel-size times --pipeline-model-parallel-size must divide the number of ranks",
            f"{tensor} x {pipe} and {world} rank(s)",
        )
    return world // (tensor * pipe)


def initialize_groups(config: ParallelConfig, heads: Heads | None = None) -> Groups:
    """Build the process groups; every rank calls it, after torch.distributed is initialised, inside each of ``heads``.

    A second call in one process with the same sizes returns the groups that exist; with other sizes it builds them
    anew. Raises ConfigError if the sizes do not divide the number of ranks.
    """
    data_parallel_size(config, dist.get_world_size())
    sizes = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if parallel_state.model_parallel_is_initialized() and sizes != (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    ):
        parallel_state.destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes[0],
            pipeline_model_parallel_size=sizes[1],
            distributed_timeout_minutes=config.distributed_timeout_minutes,
        )
    data, tensor = parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    pipe = parallel_state.get_pipeline_model_parallel_group()
    return Groups(
        data=data,
        data_rank=dist.get_rank(data),
        data_size=dist.get_world_size(data),
        tensor=tensor,
        tensor_rank=dist.get_rank(tensor),
        tensor_size=dist.get_world_size(tensor),
        pipe=pipe,
        pipe_rank=dist.get_rank(pipe),
        pipe_size=dist.get_world_size(pipe),
        model=parallel_state.get_model_parallel_group(),
        stage=parallel_state.get_tensor_and_data_parallel_group(),
        everyone=dist.group.WORLD if heads is None else heads.job,
        rank=dist.get_rank() if heads is None else heads.job_rank,
        world=dist.get_world_size() if heads is None else heads.job_size,
        sequence=config.sequence_parallel,
        heads=heads,
    )


def initialize_single_process(store_path: str) -> Groups:
    """Groups of one gloo process without a launcher (tools and dense tests); ``store_path`` is a file."""
    if not dist.is_initialized():
        store = dist.FileStore(store_path, 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    return initialize_groups(ParallelConfig())
