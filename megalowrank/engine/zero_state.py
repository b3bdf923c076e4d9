"""Where DeepSpeed keeps masters, moments and weights: the only file that reads its private attributes.

Pinned to deepspeed 0.19.8; ``tests/engine/test_equality.py`` is the canary.

| optimizer               | when          | flat masters                        | where a parameter lies      |
|-------------------------|---------------|-------------------------------------|-----------------------------|
| ours                    | ZeRO-0, fp32  | the parameters, moved into an arena | whole                       |
| FP16_UnfusedOptimizer   | ZeRO-0, bf16  | fp32_groups, moved into an arena    | whole                       |
| DeepSpeedZeroOptimizer  | ZeRO-1, 2     | single_partition_of_fp32_groups     | param._hp_mapping           |
| DeepSpeedZeroOptimizer_Stage3 | ZeRO-3  | fp32_partitioned_groups_flat        | grad_position, param.ds_tensor |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups as deepspeed_groups

from megalowrank.engine.arena import flatten_in_place, whole_partition
from megalowrank.lowrank.fold import WeightPiece
from megalowrank.lowrank.probe import Probe
from megalowrank.lowrank.state import FlatForwardCopy, FlatPartition, ForwardCopy, Fragment
from megalowrank.lowrank.vectors import VectorSet, clip_runs, element_index

Factors = Sequence[torch.nn.Parameter]
Sharded = Any  # a parameter, with the attributes that ZeRO-3 hangs on it


@dataclass(frozen=True)
class ZeroLayout:
    """Partitions of this rank, forward copies of the factors, and whether masters are sharded."""

    partitions: list[FlatPartition]
    forward: ForwardCopy
    masters_sharded: bool


def zero_layout(engine: Any, factors: Factors) -> ZeroLayout:
    """Read the layout of an initialised DeepSpeed engine. Every rank calls it once."""
    zero = engine.optimizer
    readers: dict[str, Callable[[Any, Factors], ZeroLayout]] = {
        "VectorClockAdamW": _plain,
        "FP16_UnfusedOptimizer": _unfused,
        "DeepSpeedZeroOptimizer": _stage_1_and_2,
        "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    }
    return readers[type(zero).__name__](zero, factors)


def forget_model_parallelism() -> None:
    """Drop what an earlier engine of this process told DeepSpeed of its layout, which would hold for the next one."""
    deepspeed_groups.mpu = None


def global_grad_norm(engine: Any) -> Any:
    """The norm of the last update's gradient over all ranks, before clipping: a float or a scalar tensor."""
    zero = engine.optimizer
    norm = zero.grad_norm if hasattr(zero, "grad_norm") else zero._global_grad_norm
    return float("nan") if norm is None else norm


def step_was_applied(engine: Any) -> bool:
    """Whether the last step updated anything; false when the gradient was not finite."""
    zero = engine.optimizer
    return bool(zero.step_applied) if hasattr(zero, "step_applied") else not zero.overflow


def release_gathered(engine: Any) -> None:
    """Under ZeRO-3 give back what a forward pass without a step left gathered, but for persistent parameters."""
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.empty_partition_cache()
        persistent = engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether the engine cuts the parameter itself (ZeRO-3)."""
    return hasattr(parameter, "ds_tensor")


class _ProbeSchedule(schedule.TrainSchedule):
    """The order of a training step without its end."""

    def steps(self) -> Iterator[list[Any]]:
        ends = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, ends)]


def probe_pipeline(engine: Any, micro_batches: int, probe: Probe) -> None:
    """Forward and backward of a pipeline engine's next ``micro_batches``, of which only ``probe`` learns.

    Every stage calls it; DeepSpeed's schedule and communication, without its hooks and gradients.
    """

    def forward(pipe: Any, buffer_id: int) -> None:
        outputs = pipe.module(pipe.pipe_buffers["inputs"][buffer_id])
        pipe.pipe_buffers["outputs"][buffer_id] = outputs
        if pipe.is_last_stage():
            pipe.loss = pipe.module.loss_fn(outputs, pipe.pipe_buffers["labels"][buffer_id])

    def backward(pipe: Any, buffer_id: int) -> None:
        last, inputs = pipe.is_last_stage(), pipe.pipe_buffers["inputs"][buffer_id]
        received = [] if pipe.is_first_stage() else [inputs]
        outputs = pipe.loss if last else pipe.pipe_buffers["outputs"][buffer_id]
        if probe.anchors or received:
            found = torch.autograd.grad(outputs, [*probe.anchors, *received], None if last else pipe.grad_layer)
            inputs.grad = found[-1] if received else None
        pipe.pipe_buffers["outputs"][buffer_id] = None

    own = {schedule.ForwardPass: forward, schedule.BackwardPass: backward}
    engine._INSTRUCTION_MAP = {**type(engine)._INSTRUCTION_MAP, **own}
    try:
        engine._exec_schedule(_ProbeSchedule(micro_batches, engine.num_stages, engine.stage_id))
    finally:
        del engine._INSTRUCTION_MAP


def weight_locator(parameter: torch.nn.Parameter) -> Callable[[], WeightPiece]:
    """Where this rank stores a frozen weight now."""
    if not is_sharded(parameter):
        return lambda: WeightPiece(parameter.data.view(-1), 0)
    return lambda: _sharded_weight(parameter)


def forward_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """What this rank stores of the parameters that the forward pass reads, frozen ones included; views."""
    found = []
    for parameter in module.parameters():
        piece = weight_locator(parameter)()
        found += [piece.flat] if piece.mirror is None else [piece.flat, piece.mirror[0]]
    return found


def refresh_forward(engine: Any, layout: ZeroLayout, parameters: Sequence[Sharded]) -> None:
    """Copy masters into the forward copies of all ``parameters``, after masters were loaded.

    Every rank calls it; ZeRO-1 and 2 gather once, ZeRO-3 stays local except for persistent parameters.
    """
    zero = engine.optimizer
    kind = type(zero).__name__
    if kind == "FP16_UnfusedOptimizer":
        for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master.data)
    elif kind == "DeepSpeedZeroOptimizer":
        zero.update_lp_params()
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        for partition in layout.partitions:
            for fragment in partition.fragments:
                owner: Sharded = fragment.parameter
                shard = owner.ds_tensor.data[: fragment.numel]
                shard.copy_(partition.master[fragment.offset : fragment.offset + fragment.numel])
        persistent = [p for p in parameters if p.ds_persist]
        if persistent:
            persistent[0].all_gather(persistent)


def _plain(zero: Any, factors: Factors) -> ZeroLayout:
    groups = [group["params"] for group in zero.param_groups]
    partitions = [whole_partition(group, group) for group in groups]
    return ZeroLayout(partitions, _flat_copy(factors, partitions[0].master), False)


def _unfused(zero: Any, factors: Factors) -> ZeroLayout:
    partitions = [whole_partition(low, high) for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True)]
    flats = [flatten_in_place(group)[0] for group in zero.fp16_groups]
    return ZeroLayout(partitions, _flat_copy(factors, flats[0]), False)


def _stage_1_and_2(zero: Any, factors: Factors) -> ZeroLayout:
    partitions = []
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                fragments.append(Fragment(parameter, high.start, low.start, low.numel))
        partitions.append(FlatPartition(flat.data, [(flat, 0)], fragments))
    return ZeroLayout(partitions, _flat_copy(factors, zero.bit16_groups_flat[0]), True)


def _stage_3(zero: Any, factors: Factors) -> ZeroLayout:
    """``zero.device`` is that of the masters, which may be offloaded; the forward pass runs on the accelerator."""
    partitions = []
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        fragments = []
        for parameter in group:
            _, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start, numel = _shard_range(parameter, int(padded))
            if numel > 0:
                fragments.append(Fragment(parameter, int(offset), start, numel))
        partitions.append(FlatPartition(flat.data, [(flat, 0)], fragments))
    forward = ShardedForwardCopy(factors, zero.dtype, get_accelerator().current_device_name())
    return ZeroLayout(partitions, forward, True)


def _flat_copy(factors: Factors, flat: torch.Tensor) -> FlatForwardCopy:
    size = flat.element_size()
    offsets = [(p.data.data_ptr() - flat.data_ptr()) // size if p.requires_grad else -1 for p in factors]
    trained = [(offset, p) for offset, p in zip(offsets, factors, strict=True) if p.requires_grad]
    if any(offset < 0 or offset + p.numel() > flat.numel() for offset, p in trained):
        raise RuntimeError("DeepSpeed put the factors into more than one flat group; pinned version is 0.19.8")
    return FlatForwardCopy(flat.data, np.array(offsets, dtype=np.int64))


def _shard_range(parameter: Sharded, padded: int) -> tuple[int, int]:
    """(first element, number of elements) of this rank's shard, without padding."""
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    start = rank * padded
    return start, max(0, min(padded, parameter.ds_numel - start))


def _sharded_weight(parameter: Sharded) -> WeightPiece:
    start, numel = _shard_range(parameter, int(parameter.ds_tensor.ds_numel))
    shard = parameter.ds_tensor.data[:numel]
    if parameter.ds_persist:
        if parameter.ds_status != ZeroParamStatus.AVAILABLE:
            parameter.all_gather([parameter])
        return WeightPiece(parameter.data.view(-1), 0, (shard, start))
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition()
    return WeightPiece(shard, start)


class ShardedForwardCopy:
    """Forward copies under ZeRO-3: a shard on every rank, and the whole where a parameter is gathered."""

    def __init__(self, factors: Sequence[Sharded], dtype: torch.dtype, device: Any) -> None:
        self.factors, self.dtype = factors, dtype
        self.device = torch.device(device)

    def read(self, vectors: VectorSet) -> None:
        """Sharded: there is nothing to read without communication."""
        return

    def write(self, vectors: VectorSet, packed: torch.Tensor) -> None:
        """Overwrite the part of each vector in this rank's shard, and gathered copies."""
        for factor in np.unique(vectors.factors).tolist():
            parameter = self.factors[factor]
            chosen = vectors.factors == factor
            lengths, offsets = vectors.lengths[chosen], vectors.offsets[chosen]
            starts = vectors.rows[chosen] * lengths
            begin, numel = _shard_range(parameter, int(parameter.ds_tensor.ds_numel))
            _scatter(parameter.ds_tensor.data, begin, numel, starts, lengths, offsets, packed)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                _scatter(parameter.data.view(-1), 0, parameter.ds_numel, starts, lengths, offsets, packed)


def _scatter(
    flat: torch.Tensor,
    begin: int,
    numel: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    packed: torch.Tensor,
) -> None:
    """Write runs of ``packed`` to elements ``starts`` of a tensor of which ``flat`` holds [begin, begin + numel)."""
    skipped, left = clip_runs(starts, lengths, np.full_like(starts, begin), np.full_like(starts, numel))
    own = left > 0
    if not own.any():
        return
    here = element_index((starts + skipped - begin)[own], left[own], flat.device)
    there = element_index((offsets + skipped)[own], left[own], packed.device)
    flat.index_copy_(0, here, packed.index_select(0, there).to(flat.device, flat.dtype))
