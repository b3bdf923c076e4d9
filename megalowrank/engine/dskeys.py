"""Every key of a DeepSpeed 0.19.8 JSON: how it is read, or why it is refused.

A table maps a name to one decision: ``Value`` (read, and passed on unless it is ours), ``Only`` (one
value is what happens anyway, every other is refused), ``Refused``, or another table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EVERY_STAGE = (0, 1, 2, 3)


@dataclass(frozen=True)
class Value:
    """A key that is read.

    ``kind`` is one of int, number, bool, text, texts and betas. ``auto`` allows "auto". DeepSpeed acts on
    the key under ZeRO ``stages``; elsewhere only ``neutral`` is accepted, which asks for nothing.
    """

    kind: str
    minimum: float = 0
    choices: tuple = ()
    reason: str = ""
    auto: bool = False
    stages: tuple[int, ...] = EVERY_STAGE
    neutral: Any = None
    multiple: int = 1


@dataclass(frozen=True)
class Only:
    """A key with one accepted value, which is dropped; ``also`` means the same."""

    value: Any
    reason: str
    also: Any = None


@dataclass(frozen=True)
class Refused:
    """A key that is not supported; with ``switch`` it is accepted, and dropped, when switched off."""

    reason: str
    switch: bool = False


Decision = Value | Only | Refused | dict[str, Any]
Table = dict[str, Decision]

_METRICS = "metrics.jsonl is written instead"
_CHECKPOINTS = "it acts on DeepSpeed's checkpoints, and this project writes its own"
_REMOVED = "it was removed from DeepSpeed"
_NVME_STATE = "on NVMe the state of single vectors cannot be reached"
_NVME = "it acts on NVMe; " + _NVME_STATE
_FOLDS = "it is not tested with weights that are folded in place"
_OTHER_OPTIMIZER = "optimizer state is reset per vector, which only the built-in AdamW can do"
_LINEAR = "it replaces torch's linear by one whose saving frozen weights do not need"
_MISPLACED = "DeepSpeed 0.19.8 then records wrong places of the masters, and vectors would be written elsewhere"
_ALWAYS_SET = "the built-in AdamW is a client optimizer, so this is always set"


def _bool(stages: tuple[int, ...], neutral: bool | None = False, auto: bool = False) -> Value:
    return Value("bool", stages=stages, neutral=neutral, auto=auto)


def _elements(stages: tuple[int, ...], minimum: int = 0, auto: bool = False, multiple: int = 1) -> Value:
    return Value("int", minimum, stages=stages, auto=auto, multiple=multiple)


_DEVICE = Value("text", choices=("none", "cpu"), reason="only host memory is; " + _NVME_STATE)

OFFLOAD_OPTIMIZER: Table = {
    "device": _DEVICE,
    "pin_memory": Value("bool"),
    "buffer_count": Value("int"),
    "fast_init": Value("bool"),
    "nvme_path": Refused(_NVME),
    "pipeline_read": Only(False, _NVME),
    "pipeline_write": Only(False, _NVME),
    "ratio": Only(1.0, "a partition of the optimizer is stepped whole, on one device"),
    "super_offload": Only(False, "it brings its own optimizer; " + _OTHER_OPTIMIZER),
    "cpuadam_cores_perc": Refused("it acts with super_offload, which is not supported"),
}

OFFLOAD_PARAM: Table = {
    "device": _DEVICE,
    "pin_memory": Value("bool"),
    "buffer_count": Value("int"),
    "buffer_size": Value("int"),
    "max_in_cpu": Value("int"),
    "nvme_path": Refused(_NVME),
}

_STAGE3_KEYS: Table = {
    "stage3_prefetch_bucket_size": _elements((3,), auto=True),
    "stage3_param_persistence_threshold": _elements((3,), auto=True),
    "stage3_model_persistence_threshold": _elements((3,)),
    "stage3_max_live_parameters": _elements((3,)),
    "stage3_max_reuse_distance": _elements((3,)),
    "stage3_gather_16bit_weights_on_model_save": Only(False, _CHECKPOINTS),
    "stage3_module_granularity_threshold": Only(0, "it makes leaf modules; " + _FOLDS),
    "stage3_use_all_reduce_for_fetch_params": Only(False, _FOLDS),
    "stage3_allgather_sequential": Only(False, _FOLDS),
}

ZERO: Table = {
    "stage": Value("int", choices=EVERY_STAGE),
    "allgather_partitions": Only(True, "DeepSpeed no longer broadcasts instead"),
    "allgather_bucket_size": _elements((1, 2), minimum=2, multiple=2),
    "reduce_bucket_size": _elements((1, 2, 3), minimum=1, auto=True),
    "overlap_comm": _bool((1, 2, 3), auto=True),
    "reduce_scatter": _bool((1, 2, 3)),
    "contiguous_gradients": _bool((1, 2, 3)),
    "round_robin_gradients": Only(False, _MISPLACED),
    "use_multi_rank_bucket_allreduce": _bool((1, 2)),
    "parameter_alignment": _bool((1, 2)),
    "ignore_unused_parameters": _bool((1, 2), neutral=True),
    "sub_group_size": _elements((3,), minimum=1),
    "log_trace_cache_warnings": _bool((3,)),
    "enable_sanity_checks": _bool((3,)),
    **_STAGE3_KEYS,
    **{name.removeprefix("stage3_"): Refused(f"write {name}") for name in _STAGE3_KEYS},
    "stage3_gather_fp16_weights_on_model_save": Refused(_CHECKPOINTS),
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "offload_param": OFFLOAD_PARAM,
    "cpu_offload": Refused("it is deprecated; use offload_optimizer"),
    "cpu_offload_param": Refused("it is deprecated; use offload_param"),
    "cpu_offload_use_pin_memory": Refused("it is deprecated; use pin_memory of offload_optimizer or offload_param"),
    "compute_grad_norm": Only(True, "clipping and the check for non-finite steps need the norm"),
    "load_from_fp32_weights": Only(True, _CHECKPOINTS),
    "elastic_checkpoint": Only(False, _CHECKPOINTS),
    "pipeline_loading_checkpoint": Only(False, _CHECKPOINTS),
    "legacy_stage1": Only(False, _REMOVED),
    "leaf_module": Refused(_FOLDS),
    "zero_hpz_partition_size": Only(1, "the second copy of a weight would not see its folds"),
    "zero_quantized_weights": Only(False, _FOLDS),
    "zero_quantized_nontrainable_weights": Only(False, "weights are folded in place, which needs them unquantized"),
    "zero_quantized_gradients": Only(False, "it needs DeepSpeed's compiled quantizer and is not tested here"),
    "zeropp_loco_param": Refused(_REMOVED),
    "mics_shard_size": Refused(_REMOVED),
    "mics_hierarchical_params_gather": Refused(_REMOVED),
    "memory_efficient_linear": Only(False, _LINEAR),
    "override_module_apply": Only(True, "only DeepSpeed's default is tested"),
    "save_muon_momentum_buffer_in_memory": Only(False, _OTHER_OPTIMIZER),
    "zenflow": Refused("it steps selected columns with its own optimizer; " + _OTHER_OPTIMIZER),
}

BF16: Table = {
    "enabled": Value("bool", auto=True),
    "check_grad_overflow": Only(True, "a step that is not finite must be skipped"),
    "immediate_grad_update": Only(False, "it acts in DeepSpeed's BF16_Optimizer, which is not used"),
    "bf16_master_weights_and_grads": Only(False, "masters are fp32"),
    "bf16_optimizer_states": Only(False, "moments are fp32"),
}

FP16: Table = {
    "enabled": Only(False, "loss scaling is not supported; use bf16", also="auto"),
    "auto_cast": Value("bool"),
    "loss_scale": Value("number"),
    "initial_scale_power": Value("number"),
    "loss_scale_window": Value("number"),
    "hysteresis": Value("number"),
    "consecutive_hysteresis": Value("bool"),
    "min_loss_scale": Value("number"),
    "fp16_master_weights_and_grads": Only(False, "masters are fp32"),
}

OPTIMIZER: Table = {
    "type": Value("text", choices=("adamw", "adam"), reason=_OTHER_OPTIMIZER),
    "legacy_fusion": Only(False, "it acts in DeepSpeed's fp16 optimizer, which is not used"),
    "params": {
        "lr": Value("number", auto=True),
        "betas": Value("betas", auto=True),
        "eps": Value("number", auto=True),
        "weight_decay": Value("number", auto=True),
        "torch_adam": Only(True, "the built-in AdamW runs torch's kernel"),
        "adam_w_mode": Only(True, "weight decay is decoupled"),
        "bias_correction": Only(True, "the built-in AdamW always corrects"),
        "amsgrad": Only(False, "the built-in AdamW has no amsgrad"),
        "max_grad_norm": Refused("use gradient_clipping"),
    },
}

TOP_LEVEL: Table = {
    "train_batch_size": Value("int", 1, auto=True),
    "train_micro_batch_size_per_gpu": Value("int", 1, auto=True),
    "gradient_accumulation_steps": Value("int", 1, auto=True),
    "gradient_clipping": Value("number", auto=True),
    "bf16": BF16,
    "fp16": FP16,
    "optimizer": OPTIMIZER,
    "zero_optimization": ZERO,
    "communication_data_type": Value(
        "text", choices=("fp32", "bf16"), reason="without loss scaling small gradients become 0 in fp16"
    ),
    "prescale_gradients": _bool((0, 1, 2)),
    "gradient_predivide_factor": Value("number", stages=(0, 1, 2), neutral=1),
    "steps_per_print": Value("int", 1),
    "wall_clock_breakdown": Value("bool"),
    "memory_breakdown": Value("bool"),
    "dump_state": Value("bool"),
    "log_level": Value("text", choices=("debug", "info", "warning", "error", "critical")),
    "comms_logger": {
        "enabled": Value("bool"),
        "prof_all": Value("bool"),
        "prof_ops": Value("texts"),
        "verbose": Value("bool"),
        "debug": Value("bool"),
    },
    "timers": {"throughput": {"enabled": Value("bool"), "synchronized": Value("bool")}},
    "zero_allow_untested_optimizer": Only(True, _ALWAYS_SET),
    "zero_force_ds_cpu_optimizer": Only(False, _ALWAYS_SET),
    "managed_gradient_accumulation": Only(True, "DeepSpeed counts the micro-batches of an update"),
    "gradient_allreduce_op": Only("mean", "gradients are means over ranks and micro-batches"),
    "disable_python_gc": Only(False, "nothing would call DeepSpeed's collector"),
    "sequence_parallel_size": Only(1, "sequence parallelism of DeepSpeed is not supported"),
    "seq_parallel_communication_data_type": Refused("sequence parallelism of DeepSpeed is not supported"),
    "scheduler": Refused("use --lr-decay-style and --lr-warmup-iters"),
    "activation_checkpointing": Refused("use --recompute-granularity"),
    "checkpoint": Refused(_CHECKPOINTS + "; use --save and --load"),
    "datastates_ckpt": Refused(_CHECKPOINTS + "; use --save and --load"),
    "data_types": Refused("gradients accumulate in the type of the forward pass, masters and moments are fp32"),
    "torch_autocast": Refused("the model runs in one type; use bf16", switch=True),
    "bfloat16": Refused("write bf16"),
    "pipeline": Refused(
        "pipeline parallelism is set by --pipeline-model-parallel-size, recomputation by --recompute-granularity; "
        "activations are never partitioned, which would be wrong with --sequence-parallel"
    ),
    "tensor_parallel": Refused("tensor parallelism is set by --tensor-model-parallel-size"),
    "expert_parallel": Refused("the model has no experts", switch=True),
    "use_data_before_expert_parallelism": Only(False, "the model has no experts"),
    "elastic_training": Refused("a run has a fixed number of ranks; resume with another one", switch=True),
    "data_efficiency": Refused("samples are drawn by this project's sampler", switch=True),
    "dataloader_drop_last": Refused("samples are drawn by this project's sampler"),
    "vocabulary_size": Refused("use --vocab-size"),
    "weight_quantization": Refused("it acts in DeepSpeed's inference, which is not used"),
    "hybrid_engine": Refused("it generates text between steps, which pre-training does not", switch=True),
    "compile": Refused("a compiled graph would not see folds and switches between steps"),
    "aio": Refused(_NVME),
    "zenflow": Refused("it steps selected columns with its own optimizer; " + _OTHER_OPTIMIZER),
    "autotuning": Refused("it starts experiments from DeepSpeed's launcher with its own batch sizes", switch=True),
    "flops_profiler": Refused(_METRICS + ", with the arithmetic of a step from the model's shape", switch=True),
    "disable_allgather": Refused("DeepSpeed reads it and never uses it"),
    "allgather_size": Refused("use zero_optimization.allgather_bucket_size"),
    **{name: Refused(_METRICS, True) for name in ("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config")},
    **{
        name: Refused(_REMOVED, switch=True)
        for name in (
            "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting",
            "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
        )
    },
}  # fmt: skip
