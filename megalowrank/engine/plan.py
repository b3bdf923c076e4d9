"""From flags and a resolved DeepSpeed JSON to the ``Layout`` that all arithmetic reads; no process group is needed.

A run that starts and ``tools/estimate.py`` both come here, so that what is planned is what runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalowrank.config import ModelConfig, ParallelConfig
from megalowrank.engine.dsconfig import Resolved
from megalowrank.methods.base import Method
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.schedules import choose_schedules
from megalowrank.models.accounting.shapes import Matrix
from megalowrank.models.accounting.wire import Reads
from megalowrank.models.projections import projections


def layout_of(
    config: ModelConfig,
    parallel: ParallelConfig,
    resolved: Resolved,
    method: Method,
    data_size: int,
    accelerator: bool = True,
) -> Layout:
    """The layout of a run on ``data_size`` data-parallel ranks, with the schedule of every projection chosen.

    ``accelerator``: it runs on one, not on the CPU. Raises ConfigError for patterns that match nothing.
    """
    train, zero = resolved.train, resolved.deepspeed["zero_optimization"]
    layout = Layout(
        zero=resolved.stage,
        bf16=train.bf16,
        data_size=data_size,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_param=_offloaded(zero, "offload_param"),
        residual=train.fold_residual,
        candidates=method.candidates(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipe_size=parallel.pipeline_model_parallel_size,
        sequence=parallel.sequence_parallel,
        micro_batch=resolved.micro_batch_size,
        accumulation=resolved.accumulation,
        seq_length=train.seq_length,
        recompute=train.recompute_granularity == "full",
        decay_groups=train.weight_decay != 0.0,
        accelerator=accelerator,
        overlap_comm=bool(zero.get("overlap_comm", False)),
        reduce_fp32=resolved.deepspeed.get("communication_data_type") == "fp32",
        **_buckets(zero),
    )
    if parallel.lowrank_schedule == "auto":
        return replace(layout, schedules=choose_schedules(config, method.adapters(), layout))
    return replace(layout, schedules=dict.fromkeys(projections(config), parallel.lowrank_schedule))


def _offloaded(zero: dict[str, Any], block: str) -> bool:
    return zero.get(block, {}).get("device", "none") == "cpu"


def _buckets(zero: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told of buckets and persistence; the layout's defaults are DeepSpeed's."""
    names = {
        "reduce_bucket_size": "reduce_bucket",
        "stage3_prefetch_bucket_size": "prefetch_bucket",
        "stage3_param_persistence_threshold": "persistence_threshold",
        "stage3_max_live_parameters": "max_live",
        "stage3_max_reuse_distance": "max_reuse",
        "reduce_scatter": "reduce_scatter",
        "use_multi_rank_bucket_allreduce": "multi_rank_buckets",
    }
    return {name: type(zero[key])(zero[key]) for key, name in names.items() if key in zero}


def reads_of(method: Method) -> Reads:
    """What a method reads of the optimizer state of a matrix before an update, on average at the start of a run."""

    def reads(matrix: Matrix) -> tuple[float, float, float]:
        return method.planned_reads(matrix.rank or 0, matrix.rows, matrix.columns)

    return reads
