"""The planner: what it prints, what it refuses, and that a run's start says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalowrank.config import ModelConfig
from megalowrank.engine.plan import reads_of
from megalowrank.errors import ConfigError
from megalowrank.methods import METHODS
from megalowrank.models.accounting.estimate import estimate
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.parameters import count_parameters
from megalowrank.models.accounting.shapes import Matrix
from megalowrank.models.accounting.table import startup_table
from megalowrank.models.presets import apply_preset
from tests.corpus import TinyCorpus
from tests.front_door_cases import METHOD, MODEL, PROGRAM, TRAIN, environment, finish, start, succeed
from tests.harness import ROOT, run_program
from tools.estimate import planned

ISSUE = (
    "--preset llama_1b --method switchlora --lora-rank 512 --tensor-model-parallel-size 2 --bf16 --zero 1 "
    "--pipeline-model-parallel-size 2 --data-parallel-size 16 --micro-batch-size 4 --global-batch-size 1024 "
    "--seq-length 1024"
)
LARGE = (
    "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --num-query-groups 8 "
    "--vocab-size 128256 --method switchlora --lora-rank 1024 --bf16 --zero 1 --tensor-model-parallel-size 8 "
    "--pipeline-model-parallel-size 16 --data-parallel-size 32 --seq-length 8192 --micro-batch-size 1 "
    "--global-batch-size 2048 --sequence-parallel --recompute-granularity full"
)


def plan(words: str) -> dict[str, Any]:
    return planned(words.split())[0].as_json()


def layout(words: str) -> Layout:
    return planned(words.split())[0].layout


def test_a_plan_adds_up() -> None:
    """Parameters are those of the model, categories add up, stages share the work."""
    found = plan(ISSUE)
    method = METHODS["switchlora"](METHODS["switchlora"].config_class(lora_rank=512))
    count = count_parameters(apply_preset(ModelConfig(preset="llama_1b"), None), method.adapters())
    assert found["parameters"]["total"] == count.total and found["parameters"]["trainable"] == count.trainable
    assert found["layout"]["world"] == 64 and found["tokens_per_update"] == 1024 * 1024
    for stage in found["stages"]:
        assert stage["device_bytes"] == sum(size["device"] for size in stage["memory"].values())
        assert stage["host_bytes"] == stage["memory"]["candidates (host)"]["host"] > 0
    assert sum(stage["blocks"][1] - stage["blocks"][0] for stage in found["stages"]) == 24
    whole = found["flops_per_token"] * found["tokens_per_update"]
    ranks = sum(stage["flops"] for stage in found["stages"]) * 2 * 16
    assert whole < ranks < 1.2 * whole
    assert found["pipeline_bubble"] == pytest.approx(1 / 16, rel=0.1)


def test_a_large_plan_is_quick_and_starts_nothing() -> None:
    """70 billion parameters on 4096 GPUs, without the libraries that would build them."""
    script = (
        "import runpy, sys, time; sys.argv = ['tools/estimate.py', *sys.argv[1:], '--json'];"
        "runpy.run_path('tools/estimate.py', run_name='__main__');"
        "assert not {'deepspeed', 'megatron'} & set(sys.modules), 'a library was imported';"
        "assert time.process_time() < 20, time.process_time()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *LARGE.split()], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["stages"]) == 16 and found["layout"]["world"] == 4096
    assert 80e9 < found["parameters"]["total"] < 90e9
    assert max(stage["device_bytes"] for stage in found["stages"]) < 80 * 2**30
    groups = {entry["group"] for stage in found["stages"] for entry in stage["collectives"]}
    assert groups == {"tensor", "data", "pipe", "model", "world"}


def test_json_of_deepspeed_says_the_same_as_flags(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    shared = "--preset llama_60m --method lora --data_parallel_size 4 --micro-batch-size 2"
    flags = plan(f"{shared} --zero 3 --offload-optimizer --offload-param --bf16")
    assert plan(f"{shared} --ds-config {path}") == flags
    assert flags["stages"][0]["memory"]["masters"]["host"] > 0 == flags["stages"][0]["memory"]["masters"]["device"]
    assert plan(f"{shared} --zero 3 --bf16")["stages"][0]["memory"]["masters"]["host"] == 0


def test_every_flag_reaches_the_layout(tmp_path: Path) -> None:
    """What DeepSpeed is told, too; the defaults are DeepSpeed's."""
    zero = {
        "stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 1e6, "stage3_max_reuse_distance": 7,
        "stage3_prefetch_bucket_size": 5, "stage3_param_persistence_threshold": 3, "stage3_max_live_parameters": 9,
    }  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "communication_data_type": "fp32"}))
    flags = (
        "--preset llama_60m --method switchlora --tensor-model-parallel-size 2 --sequence-parallel --seq-length 64 "
        "--recompute-granularity full --bf16 --fold-residual int8 --weight-decay 0.1 --lowrank-schedule partial "
        f"--micro-batch-size 3 --global-batch-size 48 --data-parallel-size 4 --cpu --ds-config {path}"
    )
    schedules = dict.fromkeys(("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down"), "partial")
    assert layout(flags) == Layout(
        zero=3, bf16=True, data_size=4, offload_param=True, residual="int8", candidates="host", tensor_size=2,
        sequence=True, schedules=schedules, micro_batch=3, accumulation=4, seq_length=64, recompute=True,
        decay_groups=True, accelerator=False, reduce_bucket=10**6, prefetch_bucket=5, persistence_threshold=3,
        max_live=9, max_reuse=7, reduce_fp32=True,
    )  # fmt: skip
    plain = layout("--preset llama_60m --method lora --micro-batch-size 1 --zero 1 --offload-optimizer")
    same = dict.fromkeys(schedules, "ride")
    assert plain == Layout(1, False, offload_optimizer=True, seq_length=512, schedules=same)
    path.write_text(json.dumps({"zero_optimization": {
        "stage": 2, "overlap_comm": True, "reduce_scatter": False, "use_multi_rank_bucket_allreduce": False,
    }}))  # fmt: skip
    found = layout(f"--preset llama_60m --method lora --micro-batch-size 1 --ds-config {path}")
    assert (found.overlap_comm, found.reduce_scatter, found.multi_rank_buckets) == (True, False, False)


def test_every_shipped_configuration_can_be_planned() -> None:
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        found = plan(f"--preset llama_60m --ds-config {path} --data-parallel-size 2 --micro-batch-size 1")
        assert found["stages"][0]["device_bytes"] > 0


def test_a_refresh_of_subspaces_is_planned() -> None:
    """The gradients of all adapted W in float32 go to their owners, and every update is charged its share."""
    flags = "--preset llama_60m --micro-batch-size 1 --global-batch-size 4 --zero 1 --data-parallel-size 2"
    adapted = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    for method, rotates in (("golore", 2), ("galore", 1)):
        found = plan(f"{flags} --method {method} --lora-rank 128 --update-proj-gap 50")["stages"][0]["refresh"]
        volumes = {(v["group"], v["collective"]): v for v in found["collectives"]}
        assert volumes["data", "reduce"]["bytes"] == 4 * adapted and volumes["data", "reduce"]["calls"] == 56
        longer = 8 * 128 * (4 * 512 + 3 * 1376)
        assert volumes["data", "all-reduce"]["bytes"] == 4 * (rotates * longer + 8 * 7 * 128 * 512 + 1)
        assert found["bytes_per_update"] == pytest.approx(sum(v["bytes"] for v in volumes.values()) / 50)
        assert found["held_bytes"] == 4 * adapted
        halved = plan(f"{flags} --method {method} --lora-rank 128 --probe-passes 2")["stages"][0]["refresh"]
        assert halved["held_bytes"] == 2 * adapted
    assert plan(f"{flags} --method lora --lora-rank 128")["stages"][0]["refresh"] is None


def test_methods_tell_what_they_read() -> None:
    matrix = Matrix("layers.0.attention.q", 64, 48, 8)
    for name, flags, expected in (
        ("full", {}, (0.0, 0.0, 0.0)), ("lora", {"lora_rank": 8}, (0.0, 0.0, 0.0)),
        ("switchlora", {"lora_rank": 8, "switch_interval": 16}, (0.5, 1.0, 0.5)),
        ("relora", {"lora_rank": 8, "relora_interval": 16}, (0.5, 0.0, 0.0)),
    ):  # fmt: skip
        method = METHODS[name](METHODS[name].config_class(**flags))
        assert reads_of(method)(matrix) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset llama_60m --micro-batch-size 1 --data-parallel-size 0", "--data-parallel-size is out of range"),
        ("--preset llama_60m --micro-batch-size 1 --zero 1 --ds-config ds_configs/zero1.json", "contradict --ds-conf"),
        ("--preset llama_60m --micro-batch-size 1 --zero 2 --pipeline-model-parallel-size 2", "ZeRO stage 2 or 3"),
        ("--preset llama_60m --micro-batch-size 1 --zero 1 --pipeline-model-parallel-size 9", "above --num-layers"),
        ("--preset llama_60m --micro-batch-size 1 --tensor-model-parallel-size 3", "--tensor-model-parallel-size"),
        ("--preset llama_60m --micro-batch-size 1 --offload-optimizer", "no effect under ZeRO stage 0"),
        ("--preset llama_60m --micro-batch-size 1 --zero 4", "--zero"),
        ("--preset llama_60m", "the batch size is missing"),
        ("--preset llama_60m --micro-batch-size 3 --global-batch-size 8", "has no whole solution"),
        ("--preset llama_60m --micro-batch-size 1 --zerro 1", "unknown flag --zerro"),
        ("--preset llama_60m --micro-batch-size 1 --lora-rank 8 --lora-target nothing", "matches no layer"),
        ("--micro-batch-size 1", "--num-layers is missing"),
    ],
)
def test_refusals(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(words.split())


def test_mistakes_are_one_line_and_help_is_whole() -> None:
    code, out, err = finish(start([sys.executable, "tools/estimate.py", "--preset", "llama_60m", "--zero", "4"]))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("error: ")
    shown = succeed([sys.executable, "tools/estimate.py", "--help"])
    assert "--data-parallel-size" in shown and "--tensor-model-parallel-size" in shown and "--lora-rank" in shown


def test_a_run_prints_the_table_of_its_plan(tiny_corpus: TinyCorpus) -> None:
    flags = [*f"{MODEL} {METHOD} {TRAIN} --bf16 --ds-config ds_configs/zero3_offload.json".split(), "--dry-run"]
    printed = run_program([PROGRAM, *flags, *tiny_corpus.flags()])
    found, _ = planned([*flags, "--vocab-size", "320", "--cpu"])
    assert startup_table(found) in printed


def test_stages_are_shown_one_by_one() -> None:
    config = apply_preset(ModelConfig(preset="llama_60m"), None)
    found = estimate(config, None, Layout(1, True, 2, pipe_size=4, micro_batch=1, seq_length=64, accumulation=8))
    blocks = startup_table(found).split("\n\n")
    assert len(blocks) == 4 and len(blocks[3].splitlines()) == 5
    assert blocks[1].startswith(f"memory, stage {found.dearest}")
    for block in blocks:
        assert len({len(line) for line in block.splitlines()}) == 1
    assert startup_table(found, 2).split("\n\n")[1].startswith("memory, stage 2")
