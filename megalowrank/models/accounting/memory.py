"""Bytes of one rank by category, without a tensor or a process group.

State follows ``engine/zero_state.py``, buckets and staging follow DeepSpeed, activations ``activations.py``. What is
left out are the temporaries inside an operation, of an update, and what an allocator wastes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.activations import in_flight, kept_by_micro_batch
from megalowrank.models.accounting.gathers import gathered_by_micro_batch
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import Part, local_sizes, rank_parts
from megalowrank.models.accounting.shapes import all_projections

STATE = ("weights", "frozen W", "fold residual", "masters", "moments", "gradients", "offload staging")
RESIDUAL_BYTES = {"none": 0, "int8": 1, "int16": 2}


@dataclass
class Bytes:
    """Bytes of one category on one rank: on the device that computes, and in host memory."""

    device: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.device + self.host

    def add(self, numbers: int, on_host: bool = False) -> None:
        """Count ``numbers`` more bytes."""
        if on_host:
            self.host += numbers
        else:
            self.device += numbers


def predicted_bytes(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int = 0) -> dict[str, Bytes]:
    """Bytes of the first rank of a pipeline stage by category, as ``engine.memory.measured_bytes`` names them.

    ``weights`` is what the forward pass reads of trained parameters, ``frozen W`` of the others. ``gradients`` is
    the most that is held of them, as the backward pass ends or while AdamW runs; between updates they are mostly
    gone. With ``offload_optimizer`` more than one micro-batch needs host memory for whole gradients besides.
    ``activations`` is the most that autograd keeps, ``workspace`` what a backward pass holds beside it, ``buckets``
    what DeepSpeed reduces gradients in, ``gathered`` the most that ZeRO-3 has whole of parameters that are not
    persistent; these come with ``layout.seq_length``. Raises ConfigError for bad patterns.
    """
    parts = rank_parts(config, adapters, layout, stage)
    found = {name: Bytes() for name in STATE}
    residual = RESIDUAL_BYTES[layout.residual] if layout.bf16 else 0
    for part in parts:
        _add_weight(found["weights" if part.trained else "frozen W"], part.numel, layout)
        if part.folded:
            kept, on_host = _folded(part.numel, layout)
            found["fold residual"].add(kept * residual, on_host)
    _add_state(found, [part.numel for part in parts if part.trained], layout)
    if layout.candidates is not None:
        found[f"candidates ({layout.candidates})"] = pool = Bytes()
        pool.add(_pool(config, adapters, layout, stage), layout.candidates == "host")
    if layout.seq_length:
        micro, count = kept_by_micro_batch(config, adapters, layout, stage), in_flight(layout, stage)
        found["activations"] = Bytes(micro.most(count, layout.recompute))
        found["workspace"] = Bytes(micro.workspace(count, layout.recompute))
        found["buckets"] = Bytes(_buckets(parts, layout))
        if layout.zero == 3 and layout.data_size > 1:
            blocks = stage_blocks(config, adapters, layout, stage)
            found["gathered"] = Bytes(gathered_by_micro_batch(config, parts, blocks, layout).most * layout.low)
    return found


def _add_weight(count: Bytes, numel: int, layout: Layout) -> None:
    """A parameter as the forward pass reads it: whole, or under ZeRO-3 a shard and, if small, whole as well."""
    if layout.zero != 3:
        count.add(numel * layout.low)
        return
    count.add(-(-numel // layout.data_size) * layout.low, layout.offload_param)
    if numel <= layout.persistence_threshold and layout.data_size > 1:
        count.add(numel * layout.low)


def _folded(numel: int, layout: Layout) -> tuple[int, bool]:
    """(elements of a frozen W that this rank folds, whether they are in host memory)."""
    if layout.zero != 3 or numel <= layout.persistence_threshold:
        return numel, False
    return -(-numel // layout.data_size), layout.offload_param


def _add_state(found: dict[str, Bytes], trained: Sequence[int], layout: Layout) -> None:
    """Masters, moments and gradients; all float32 but the gradients that the backward pass leaves."""
    zero, host, low = layout.zero or 0, layout.offload_optimizer, layout.low
    if zero == 3:
        part = sum(-(-numel // layout.data_size) for numel in trained)
    else:
        part = -(-sum(trained) // (2 * layout.data_size)) * 2 if zero else sum(trained)
    found["masters"].add(4 * part if zero or layout.bf16 else 0, host)
    found["moments"].add(8 * part, host)
    if host and zero in (1, 2):
        found["gradients"].add(4 * part, on_host=True)
        found["offload staging"].add(low * (part + max(trained)), on_host=True)
        found["offload staging"].add(low * max(trained))
        return
    held = {
        0: (low + 4 + 4 * layout.bf16) * part,
        1: max(low * sum(trained), 4 * part),
        2: 4 * part,
        3: (low + 4) * part,
    }
    found["gradients"].add(held[zero], host)


def _pool(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int) -> int:
    """Candidates of a rank: the vectors of A and B are split as the factors, and dealt out to data-parallel ranks."""
    blocks, kept = stage_blocks(config, adapters, layout, stage), 0
    for projection in all_projections(config, adapters):
        if not projection.adapted or projection.block not in blocks:
            continue
        for matrix, (rows, columns) in zip(projection.matrices, local_sizes(projection, layout), strict=True):
            kept += -(-matrix.spare // layout.data_size) * (rows + columns)
    return 4 * kept


def _buckets(parts: Sequence[Part], layout: Layout) -> int:
    """Where DeepSpeed gathers gradients for their reduction: ZeRO-0 copies them, the other stages have buffers.

    ZeRO-1 and 2 have a second one with ``overlap_comm``, and the pipeline always, though it uses one.
    """
    low = 4 if layout.reduce_fp32 else layout.low
    if layout.zero is None or (layout.zero == 0 and layout.data_size == 1):
        return 0
    if layout.zero == 0:
        return low * min(sum(part.numel for part in parts if part.trained), layout.reduce_bucket)
    second = layout.zero != 3 and (layout.overlap_comm or layout.pipe_size > 1)
    return layout.low * layout.reduce_bucket * (2 if second else 1)
