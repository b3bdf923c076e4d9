"""Every key that DeepSpeed 0.19.8 knows is honoured or refused by name: two tables, and DeepSpeed's own lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from megalowrank.config import TrainConfig
from megalowrank.engine.dsconfig import Resolved, resolve
from megalowrank.engine.dskeys import TOP_LEVEL, Only, Refused, Value
from megalowrank.errors import ConfigError

Z, OO, OP, P = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "optimizer.params",
)
METRICS, CHECKPOINTS, REMOVED = "metrics.jsonl", "writes its own", "removed from DeepSpeed"
NVME, FOLDS, OWN_ADAM = "NVMe", "folded in place", "built-in AdamW"

REFUSED: dict[str, tuple[Any, str]] = {
    "scheduler": ({"type": "WarmupLR"}, "--lr-warmup-iters"),
    "activation_checkpointing": ({}, "--recompute-granularity"),
    "checkpoint": ({"load_universal": True}, CHECKPOINTS),
    "datastates_ckpt": ({}, CHECKPOINTS),
    "data_types": ({"grad_accum_dtype": "fp32"}, "fp32"),
    "torch_autocast": ({"enabled": True}, "use bf16"),
    "bfloat16": ({"enabled": True}, "write bf16"),
    "pipeline": ({}, "--pipeline-model-parallel-size"),
    "tensor_parallel": ({"autotp_size": 2}, "--tensor-model-parallel-size"),
    "sequence_parallel_size": (2, "sequence parallelism"),
    "seq_parallel_communication_data_type": ("fp32", "sequence parallelism"),
    "expert_parallel": ({"enabled": True}, "no experts"),
    "use_data_before_expert_parallelism": (True, "no experts"),
    "elastic_training": ({}, "fixed number of ranks"),
    "data_efficiency": ({"enabled": True}, "sampler"),
    "dataloader_drop_last": (False, "sampler"),
    "vocabulary_size": (100, "--vocab-size"),
    "weight_quantization": ({}, "inference"),
    "hybrid_engine": ({"enabled": True}, "generates text"),
    "compile": ({"deepcompile": True}, "compiled graph"),
    "aio": ({"block_size": 1}, NVME),
    "zenflow": ({}, OWN_ADAM),
    "autotuning": ({"enabled": True}, "batch sizes"),
    "flops_profiler": ({"enabled": True}, METRICS),
    **{
        name: ({"enabled": True}, METRICS)
        for name in ("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config")
    },
    **{
        name: ({"enabled": True}, REMOVED)
        for name in (
            "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "nebula",
            "progressive_layer_drop", "quantize_training", "sparse_attention",
        )
    },
    "sparse_gradients": (True, REMOVED),
    "graph_harvesting": (False, REMOVED),
    "disable_allgather": (True, "never uses it"),
    "disable_python_gc": (True, "collector"),
    "allgather_size": (10, "allgather_bucket_size"),
    "managed_gradient_accumulation": (False, "micro-batches"),
    "gradient_allreduce_op": ("sum", "means"),
    "zero_allow_untested_optimizer": (False, OWN_ADAM),
    "zero_force_ds_cpu_optimizer": (True, OWN_ADAM),
    "communication_data_type": ("fp16", "loss scaling"),
    "bf16.check_grad_overflow": (False, "not finite must be skipped"),
    "bf16.immediate_grad_update": (True, "BF16_Optimizer"),
    "bf16.bf16_master_weights_and_grads": (True, "masters are fp32"),
    "bf16.bf16_optimizer_states": (True, "moments are fp32"),
    "fp16.enabled": (True, "use bf16"),
    "fp16.fp16_master_weights_and_grads": (True, "masters are fp32"),
    "optimizer.legacy_fusion": (True, "fp16 optimizer"),
    f"{P}.torch_adam": (False, "torch's kernel"),
    f"{P}.adam_w_mode": (False, "decoupled"),
    f"{P}.bias_correction": (False, "always corrects"),
    f"{P}.amsgrad": (True, "no amsgrad"),
    f"{P}.max_grad_norm": (1.0, "gradient_clipping"),
    f"{Z}.allgather_partitions": (False, "no longer broadcasts"),
    f"{Z}.round_robin_gradients": (True, "wrong places"),
    f"{Z}.compute_grad_norm": (False, "norm"),
    f"{Z}.load_from_fp32_weights": (False, CHECKPOINTS),
    f"{Z}.elastic_checkpoint": (True, CHECKPOINTS),
    f"{Z}.pipeline_loading_checkpoint": (True, CHECKPOINTS),
    f"{Z}.stage3_gather_16bit_weights_on_model_save": (True, CHECKPOINTS),
    f"{Z}.stage3_gather_fp16_weights_on_model_save": (True, CHECKPOINTS),
    f"{Z}.stage3_module_granularity_threshold": (1, "leaf modules"),
    f"{Z}.stage3_use_all_reduce_for_fetch_params": (True, FOLDS),
    f"{Z}.stage3_allgather_sequential": (True, FOLDS),
    f"{Z}.prefetch_bucket_size": (1, "write stage3_prefetch_bucket_size"),
    f"{Z}.cpu_offload": (True, "offload_optimizer"),
    f"{Z}.cpu_offload_param": (True, "offload_param"),
    f"{Z}.cpu_offload_use_pin_memory": (True, "pin_memory"),
    f"{Z}.legacy_stage1": (True, REMOVED),
    f"{Z}.leaf_module": ({"names": []}, FOLDS),
    f"{Z}.zero_hpz_partition_size": (2, "folds"),
    f"{Z}.zero_quantized_weights": (True, FOLDS),
    f"{Z}.zero_quantized_nontrainable_weights": (True, FOLDS),
    f"{Z}.zero_quantized_gradients": (True, "quantizer"),
    f"{Z}.zeropp_loco_param": ({}, REMOVED),
    f"{Z}.mics_shard_size": (2, REMOVED),
    f"{Z}.mics_hierarchical_params_gather": (True, REMOVED),
    f"{Z}.memory_efficient_linear": (True, "replaces torch's linear"),
    f"{Z}.override_module_apply": (False, "default"),
    f"{Z}.save_muon_momentum_buffer_in_memory": (True, OWN_ADAM),
    f"{Z}.zenflow": ({}, OWN_ADAM),
    f"{OO}.device": ("nvme", NVME),
    f"{OO}.nvme_path": ("/tmp", NVME),
    f"{OO}.pipeline_read": (True, NVME),
    f"{OO}.pipeline_write": (True, NVME),
    f"{OO}.ratio": (0.5, "stepped whole"),
    f"{OO}.super_offload": (True, "own optimizer"),
    f"{OO}.cpuadam_cores_perc": (0.5, "super_offload"),
    f"{OP}.device": ("nvme", NVME),
    f"{OP}.nvme_path": ("/tmp", NVME),
}  # fmt: skip

PASSED_ON: dict[str, tuple[int, Any]] = {  # key -> (stage, value)
    "train_batch_size": (0, 8), "train_micro_batch_size_per_gpu": (0, 4), "gradient_accumulation_steps": (0, 1),
    "gradient_clipping": (0, 0.5), "bf16.enabled": (0, True), "communication_data_type": (3, "fp32"),
    "prescale_gradients": (0, True), "gradient_predivide_factor": (0, 2.0), "steps_per_print": (0, 7),
    "wall_clock_breakdown": (0, True), "memory_breakdown": (0, True), "dump_state": (0, True), "log_level": (0, "info"),
    "comms_logger.enabled": (0, True), "timers.throughput.enabled": (0, True),
    "timers.throughput.synchronized": (0, False),
    f"{Z}.stage": (3, 3), f"{Z}.allgather_bucket_size": (2, 10), f"{Z}.reduce_bucket_size": (3, 10),
    f"{Z}.overlap_comm": (1, True), f"{Z}.reduce_scatter": (3, False), f"{Z}.contiguous_gradients": (2, False),
    f"{Z}.use_multi_rank_bucket_allreduce": (1, False), f"{Z}.parameter_alignment": (1, True),
    f"{Z}.ignore_unused_parameters": (2, True), f"{Z}.sub_group_size": (3, 10),
    f"{Z}.log_trace_cache_warnings": (3, True), f"{Z}.enable_sanity_checks": (3, True),
    f"{Z}.stage3_prefetch_bucket_size": (3, 10), f"{Z}.stage3_param_persistence_threshold": (3, 10),
    f"{Z}.stage3_model_persistence_threshold": (3, 10), f"{Z}.stage3_max_live_parameters": (3, 10),
    f"{Z}.stage3_max_reuse_distance": (3, 10),
    f"{OO}.device": (1, "cpu"), f"{OO}.pin_memory": (1, False), f"{OO}.buffer_count": (3, 5),
    f"{OO}.fast_init": (3, True),
    f"{OP}.device": (3, "cpu"), f"{OP}.pin_memory": (3, False), f"{OP}.buffer_count": (3, 5),
    f"{OP}.buffer_size": (3, 9),
    f"{OP}.max_in_cpu": (3, 9),
}  # fmt: skip
CONSUMED = {"optimizer.type", f"{P}.lr", f"{P}.betas", f"{P}.eps", f"{P}.weight_decay"}
OFF = {f"fp16.{name}" for name in DeepSpeedFP16Config.model_fields}  # the block is accepted when it is off, and dropped
WITH_LOGGER = {f"comms_logger.{name}" for name in CommsLoggerConfig.model_fields}


def nest(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def run(document: dict[str, Any]) -> Resolved:
    return resolve(document, TrainConfig(micro_batch_size=4, lr=0.5), set(), 2, 16)


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        run(document)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_dotted_name_with_the_reason(key: str) -> None:
    value, phrase = REFUSED[key]
    message = refusal(nest(key, value))
    assert message.startswith(f"{key} is not supported: ") and phrase in message


@pytest.mark.parametrize("key", PASSED_ON)
def test_honoured_keys_reach_deepspeed(key: str) -> None:
    stage, value = PASSED_ON[key]
    document = nest(key, value)
    document.setdefault(Z, {})["stage"] = stage
    found: Any = run(document).deepspeed
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


class Spy(dict):
    """A configuration that remembers which top-level keys DeepSpeed asks for."""

    asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def decided(key: str) -> bool:
    return key in REFUSED or key in PASSED_ON or key in CONSUMED | OFF | WITH_LOGGER


def test_every_top_level_key_that_deepspeed_reads_is_decided() -> None:
    deepspeed_config.DeepSpeedConfig(Spy(train_batch_size=1))
    asked = Spy.asked | set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert len(asked) > 50 and {"zero_optimization", "timers", "sparse_gradients"} <= asked
    blocks = {"optimizer", "zero_optimization", "bf16", "fp16", "comms_logger", "timers"}
    assert [key for key in sorted(asked - blocks) if not decided(key)] == []
    assert asked <= set(TOP_LEVEL)


@pytest.mark.parametrize(
    "prefix, model",
    [
        (Z, DeepSpeedZeroConfig), (OO, DeepSpeedZeroOffloadOptimizerConfig), (OP, DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config), ("fp16", DeepSpeedFP16Config), ("comms_logger", CommsLoggerConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
    ],
)  # fmt: skip
def test_every_field_of_deepspeeds_models_is_decided(prefix: str, model: Any) -> None:
    names = {field.alias or name for name, field in model.model_fields.items()}
    keys = {f"{prefix}.{name}" for name in names} - {OO, OP}
    assert [key for key in sorted(keys) if not decided(key)] == []


def test_removed_zero_keys_and_field_names_behind_aliases_are_decided() -> None:
    assert {f"{Z}.{name}" for name in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS} <= set(REFUSED)
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        if field.alias:
            assert f"write {field.alias}" in refusal(nest(f"{Z}.{name}", 1))


def leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key of our table by dotted path."""
    found: dict[str, Any] = {}
    for name, decision in table.items():
        found |= leaves(decision, f"{prefix}{name}.") if isinstance(decision, dict) else {prefix + name: decision}
    return found


LEAVES = leaves(TOP_LEVEL)


def test_the_tables_of_this_file_are_complete() -> None:
    aliases = {f"{Z}.{name}" for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    assert [key for key in LEAVES if not decided(key) and key not in aliases] == []


@pytest.mark.parametrize("key", [key for key, decision in LEAVES.items() if isinstance(decision, Only)])
def test_the_one_accepted_value_is_accepted_and_dropped(key: str) -> None:
    only = LEAVES[key]
    document = nest(key, only.value)
    if "optimizer" in document:
        document["optimizer"]["type"] = "AdamW"
    always = run({}).deepspeed
    got = run(document).deepspeed
    got["zero_optimization"] = {k: v for k, v in got["zero_optimization"].items() if not k.startswith("offload")}
    assert got == always


@pytest.mark.parametrize("key", [key for key, decision in LEAVES.items() if isinstance(decision, Refused)])
def test_a_block_that_is_switched_off_asks_for_nothing(key: str) -> None:
    if LEAVES[key].switch:
        assert run(nest(key, {"enabled": False, "anything": 1})).deepspeed == run({}).deepspeed
        assert key in refusal(nest(key, {}))
        assert key in refusal(nest(key, {"enabled": "auto"}))
    else:
        assert key in refusal(nest(key, {"enabled": False}))


WRONG: dict[str, list[Any]] = {
    "int": [True, "two", 1.5, -1, math.nan, math.inf, None, [], {}, 10**40],
    "number": [True, "two", -1.0, math.nan, math.inf, None, [], {}, 10**400],
    "bool": [1, 0, "true", None, [], {}],
    "text": [1, None, True, [], {}, "other"],
    "texts": ["all_reduce", [1], None, {}],
    "betas": [0.9, [0.9], [0.9, 1.0], [0.9, "x"], [-0.1, 0.9], [True, 0.9], None, {}, [0.9, math.nan]],
}


@pytest.mark.parametrize("key", [key for key, decision in LEAVES.items() if isinstance(decision, Value)])
def test_wrong_types_and_ranges_name_the_key(key: str) -> None:
    spec = LEAVES[key]
    for value in WRONG[spec.kind] + ([] if spec.auto else ["auto"]):
        assert refusal(nest(key, value)).startswith(key), value
    if spec.auto:
        assert refusal(nest(key, "automatic")).startswith(key)


@pytest.mark.parametrize("key", ["bf16", "fp16", "optimizer", P, Z, OO, OP, "comms_logger", "timers.throughput"])
def test_a_block_has_to_be_an_object(key: str) -> None:
    values: list[Any] = [True, None, 3, "auto", []]
    for value in values:
        assert refusal(nest(key, value)).startswith(f"{key} is not an object")


@pytest.mark.parametrize(
    "key, close",
    [
        ("train_batchsize", "train_batch_size"),
        (f"{Z}.stge", f"{Z}.stage"),
        (f"{OP}.pin_memmory", f"{OP}.pin_memory"),
        (f"{P}.weight_decy", f"{P}.weight_decay"),
    ],
)
def test_unknown_keys_get_the_nearest_name(key: str, close: str) -> None:
    message = refusal(nest(key, 1))
    assert message.startswith(key) and message.endswith(f"did you mean {close}?")


def test_unknown_keys_without_a_near_name() -> None:
    assert refusal({"qqqq": 1}) == "qqqq is no key of the DeepSpeed JSON"
    numbered: Any = {7: 1}
    assert "no key" in refusal(numbered)
