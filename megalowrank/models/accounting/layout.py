"""What of a run decides bytes and collectives, as plain values: from flags, or from a run that is about to start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.stages import split_layers


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over ranks, and what DeepSpeed is told. Sizes are numbers of ranks, buckets elements.

    ``zero`` is the ZeRO stage, None the dense engine. ``residual`` is none, int8 or int16 and counts only with
    ``bf16``. ``candidates`` is where a method keeps them: host, device or None. ``schedules`` says of each fused
    projection (attention.qkv, ...) how its low-rank products cross tensor-parallel ranks: ride or partial; ride is
    the default. ``accumulation`` is the number of micro-batches of ``micro_batch`` samples per update and rank;
    ``seq_length`` 0 leaves activations out. ``decay_groups``: vectors are a parameter group of their own, as with
    weight decay. ``accelerator``: an RMSNorm is one kernel and keeps its input, not float32 copies as on the CPU.
    """

    zero: int | None
    bf16: bool
    data_size: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    residual: str = "int16"
    candidates: str | None = None
    persistence_threshold: int = 100_000
    tensor_size: int = 1
    pipe_size: int = 1
    sequence: bool = False
    schedules: Mapping[str, str] = field(default_factory=dict)
    micro_batch: int = 1
    accumulation: int = 1
    seq_length: int = 0
    recompute: bool = False
    decay_groups: bool = False
    accelerator: bool = True
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    overlap_comm: bool = False
    reduce_scatter: bool = True
    multi_rank_buckets: bool = True
    reduce_fp32: bool = False

    @property
    def low(self) -> int:
        """Bytes of an element that the forward pass computes with."""
        return 2 if self.bf16 else 4

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.tensor_size * self.pipe_size * self.data_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.seq_length

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch that a rank has between linears."""
        return self.tokens // self.tensor_size if self.splits_sequence else self.tokens

    @property
    def splits_sequence(self) -> bool:
        """Whether activations between linears are really in several parts."""
        return self.sequence and self.tensor_size > 1

    @property
    def sharded(self) -> bool:
        """Whether optimizer state is divided over data-parallel ranks."""
        return (self.zero or 0) > 0

    def rides(self, projection: str) -> bool:
        """Whether low-rank products of a fused projection share the buffers of its own collectives."""
        return self.schedules.get(projection, "ride") == "ride"


def stage_blocks(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int) -> range:
    """The blocks of a pipeline stage."""
    if layout.pipe_size == 1:
        return range(config.num_layers or 0)
    return range(*split_layers(config, adapters, layout.pipe_size, layout.seq_length, layout.recompute)[stage])
