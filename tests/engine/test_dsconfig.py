"""Resolving a DeepSpeed JSON against the flags: batch, optimizer, precision, ZeRO, files, and a fuzz."""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megalowrank.config import TrainConfig
from megalowrank.engine.dsconfig import Resolved, resolve
from megalowrank.errors import ConfigError
from tests.harness import ROOT

CPU = {"device": "cpu"}


def run(document: Any, given: str = "", ranks: int = 2, hidden: int = 16, **flags: Any) -> Resolved:
    """Resolve with sizes and a learning rate that always work, unless ``flags`` say otherwise."""
    flags = {"micro_batch_size": 4, "lr": 0.5, **flags}
    return resolve(document, TrainConfig(**flags), set(given.split()), ranks, hidden)


def refusal(document: Any, given: str = "", **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        run(document, given, **flags)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    return message


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def adamw(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


# ---------------------------------------------------------------- what is always there


def test_an_empty_json_gives_the_whole_configuration() -> None:
    found = run({}, clip_grad=0.25)
    assert found.deepspeed == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "zero_optimization": {"stage": 0, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }
    assert (found.micro_batch_size, found.global_batch_size, found.accumulation) == (4, 8, 1)
    assert (found.stage, found.pin_host_memory) == (0, True)


def test_the_arguments_are_left_alone() -> None:
    document = {**zero(2, overlap_comm="auto"), **adamw(betas=[0.5, 0.6])}
    before, flags = copy.deepcopy(document), TrainConfig(lr=0.5, micro_batch_size=4)
    found = resolve(document, flags, set(), 2, 16)
    found.deepspeed["zero_optimization"]["overlap_comm"] = None
    assert document == before and flags == TrainConfig(lr=0.5, micro_batch_size=4)
    json.dumps(found.deepspeed)


def test_deepspeed_is_not_imported() -> None:
    code = "import sys, megalowrank.engine.dsconfig; sys.exit('deepspeed' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- the batch triad


def expected_batch(total: int | None, micro: int | None, steps: int | None, ranks: int) -> set[tuple[int, int, int]]:
    """Every (micro, accumulation, total) that fits what is given; without two sizes there is no accumulation."""
    free = steps is None and (total is None or micro is None)
    return {
        (m, a, m * a * ranks)
        for m, a in itertools.product(range(1, 13), repeat=2)
        if micro in (None, m) and steps in (None, a) and total in (None, m * a * ranks) and not (free and a > 1)
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("by_flag", [True, False])
def test_batch_against_an_independent_search(ranks: int, by_flag: bool) -> None:
    for total, micro, steps in itertools.product([None, *range(1, 13)], [None, 1, 2, 3, 4, 5], [None, 1, 2, 3, 4]):
        document: dict[str, Any] = {} if steps is None else {"gradient_accumulation_steps": steps}
        flags: dict[str, Any] = {"micro_batch_size": None, "global_batch_size": None}
        if by_flag:
            flags = {"micro_batch_size": micro, "global_batch_size": total}
        else:
            document |= {"train_batch_size": total or "auto", "train_micro_batch_size_per_gpu": micro or "auto"}
        fits = expected_batch(total, micro, steps, ranks) if total or micro else set()
        if not fits:
            refusal(document, ranks=ranks, **flags)
            continue
        found = run(document, ranks=ranks, **flags)
        assert {(found.micro_batch_size, found.accumulation, found.global_batch_size)} == fits
        assert (found.train.micro_batch_size, found.train.global_batch_size) == (
            found.micro_batch_size, found.global_batch_size,
        )  # fmt: skip


def test_a_contradiction_prints_the_equation_and_the_sources() -> None:
    document = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    message = refusal(document, micro_batch_size=4, global_batch_size=32)
    assert "global batch 32 = micro batch 4 x accumulation 2 x data-parallel size 2 does not hold" in message
    assert "global batch from --global-batch-size" in message
    assert "micro batch from --micro-batch-size and train_micro_batch_size_per_gpu" in message
    assert "accumulation from gradient_accumulation_steps" in message


def test_what_does_not_divide_prints_the_equation() -> None:
    message = refusal({"train_batch_size": 30}, micro_batch_size=4)
    assert "global batch 30 = micro batch 4 x accumulation ? x data-parallel size 2 has no whole solution" in message
    assert "(global batch from train_batch_size, micro batch from --micro-batch-size)" in message


def test_a_size_given_twice_names_both() -> None:
    message = refusal({"train_batch_size": 16}, global_batch_size=8)
    assert "8 by --global-batch-size and 16 by train_batch_size" in message and "micro batch x accumulation" in message


@pytest.mark.parametrize("document", [{}, {"gradient_accumulation_steps": 2}, {"train_batch_size": "auto"}])
def test_no_batch_size_names_the_flags(document: dict[str, Any]) -> None:
    message = refusal(document, micro_batch_size=None)
    assert "--global-batch-size" in message and "--micro-batch-size" in message


# ---------------------------------------------------------------- JSON against flags

TAKEN = [
    ({"gradient_clipping": 0.5}, "clip_grad", 0.5, "gradient_clipping"),
    ({"gradient_clipping": 0}, "clip_grad", 0.0, "gradient_clipping"),
    ({"bf16": {"enabled": True}}, "bf16", True, "bf16.enabled"),
    (adamw(lr=0.25), "lr", 0.25, "optimizer.params.lr"),
    (adamw(betas=[0.5, 0.999]), "adam_beta1", 0.5, "optimizer.params.betas"),
    (adamw(betas=[0.9, 0.5]), "adam_beta2", 0.5, "optimizer.params.betas"),
    (adamw(eps=1e-5), "adam_eps", 1e-5, "optimizer.params.eps"),
    (adamw(weight_decay=0.1), "weight_decay", 0.1, "optimizer.params.weight_decay"),
]


@pytest.mark.parametrize("document, name, value, key", TAKEN)
def test_the_json_wins_over_defaults_but_not_over_flags(document: Any, name: str, value: Any, key: str) -> None:
    assert getattr(run(document).train, name) == value
    assert getattr(run(document, given=name, **{name: value}).train, name) == value
    message = refusal(document, given=name)
    assert f"--{name.replace('_', '-')} and {key} of the DeepSpeed JSON contradict each other" in message


def test_auto_takes_the_flag() -> None:
    document = {
        **adamw(lr="auto", betas="auto", eps="auto", weight_decay="auto"),
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    found = run(document, given="lr bf16", lr=0.125, bf16=True, adam_beta1=0.8, adam_eps=1e-7, clip_grad=2.0)
    assert (found.train.lr, found.train.bf16, found.train.adam_beta1, found.train.clip_grad) == (0.125, True, 0.8, 2.0)
    assert found.deepspeed["bf16"]["enabled"] is True and found.deepspeed["gradient_clipping"] == 2.0
    assert "optimizer" not in found.deepspeed


def test_bf16_flag_against_bf16_disabled() -> None:
    assert "--bf16 and bf16.enabled" in refusal({"bf16": {"enabled": False}}, given="bf16", bf16=True)
    assert run({"bf16": {"enabled": False}}, bf16=False).train.bf16 is False
    assert run({"bf16": {}}, given="bf16", bf16=True).train.bf16 is True
    assert (
        run({"bf16": {"enabled": True, "check_grad_overflow": True}}).deepspeed["bf16"]["check_grad_overflow"] is True
    )


def test_fp16_off_is_accepted_and_dropped() -> None:
    for enabled in (False, "auto"):
        assert "fp16" not in run({"fp16": {"enabled": enabled, "loss_scale": 0, "hysteresis": 2}}).deepspeed
    assert "loss scaling is not supported; use bf16" in refusal({"fp16": {"enabled": True}})


@pytest.mark.parametrize("kind", ["AdamW", "adamw", "Adam"])
def test_adam_without_decay_is_adamw(kind: str) -> None:
    assert run({"optimizer": {"type": kind, "params": {"lr": 0.5, "torch_adam": True}}}).train.lr == 0.5


def test_adam_with_decay_is_refused() -> None:
    assert "decoupled" in refusal({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}})
    assert "AdamW" in refusal({"optimizer": {"type": "Adam"}}, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["FusedAdam", "OneBitAdam", "Lamb", "Muon", "SGD", "Adagrad", "Lion", ""])
def test_other_optimizers_are_refused_with_the_reason(kind: str) -> None:
    assert "reset per vector" in refusal({"optimizer": {"type": kind}})


def test_the_learning_rate_has_to_be_known_and_positive() -> None:
    message = refusal({}, lr=None)
    assert "--lr" in message and "optimizer.params.lr" in message
    for value in (0.0, -1.0, float("nan"), float("inf")):
        assert "learning rate" in refusal({}, lr=value)
    assert "learning rate" in refusal(adamw(lr=0))
    assert "optimizer.type is missing" in refusal({"optimizer": {"params": {"lr": 1}}})


# ---------------------------------------------------------------- ZeRO


def test_auto_buckets_follow_the_hidden_size() -> None:
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "overlap_comm")
    found = run(zero(3, **dict.fromkeys(names, "auto")), hidden=100).deepspeed["zero_optimization"]
    assert [found[name] for name in names] == [10000, 9000, 1000, True]
    for stage in (0, 1, 2):
        assert run(zero(stage, overlap_comm="auto")).deepspeed["zero_optimization"]["overlap_comm"] is False


def test_integral_floats_are_whole_numbers() -> None:
    found = run(zero(2, reduce_bucket_size=5e8, allgather_bucket_size=2e8)).deepspeed["zero_optimization"]
    assert found["reduce_bucket_size"] == 500_000_000 and isinstance(found["reduce_bucket_size"], int)


EFFECTLESS = [
    zero(0, reduce_bucket_size=10), zero(0, overlap_comm=True), zero(0, reduce_scatter=True),
    zero(0, allgather_bucket_size=10), zero(3, allgather_bucket_size=10), zero(3, parameter_alignment=True),
    zero(2, sub_group_size=10), zero(2, stage3_prefetch_bucket_size="auto"), zero(1, stage3_max_live_parameters=1),
    zero(0, stage3_max_reuse_distance=1), zero(2, stage3_model_persistence_threshold=1),
    zero(2, stage3_param_persistence_threshold=1), zero(0, offload_optimizer=CPU), zero(2, offload_param=CPU),
    zero(0, use_multi_rank_bucket_allreduce=True), zero(2, enable_sanity_checks=True),
    zero(2, log_trace_cache_warnings=True), zero(2, ignore_unused_parameters=False),
    {**zero(3), "prescale_gradients": True}, {**zero(3), "gradient_predivide_factor": 2},
]  # fmt: skip


@pytest.mark.parametrize("document", EFFECTLESS, ids=json.dumps)
def test_what_would_be_ignored_is_refused(document: dict[str, Any]) -> None:
    key = next((k for k in document if k != "zero_optimization"), list(document["zero_optimization"])[-1])
    message = refusal(document)
    assert key in message and "has no effect" in message


def test_neutral_values_are_accepted_under_every_stage() -> None:
    off = {"overlap_comm": False, "reduce_scatter": False, "ignore_unused_parameters": True}
    for stage in range(4):
        run({**zero(stage, **off, offload_param={"device": "none"}), "prescale_gradients": False})


def test_combinations_that_deepspeed_would_override_or_get_wrong() -> None:
    assert "overridden" in refusal(zero(2, offload_optimizer=CPU, contiguous_gradients=False))
    assert "reduce_scatter" in refusal({**zero(2), "prescale_gradients": True})
    assert "reduce_scatter" in refusal({**zero(1), "gradient_predivide_factor": 2})
    assert "prescale_gradients" in refusal({"prescale_gradients": True, "gradient_predivide_factor": 2})
    assert "> 0" in refusal({"gradient_predivide_factor": 0})
    assert "multiple of 2" in refusal(zero(2, allgather_bucket_size=3))


def test_pinning_follows_the_first_offload_block_that_speaks() -> None:
    assert run(zero(3, offload_optimizer=CPU)).pin_host_memory is True
    assert run(zero(3, offload_optimizer={**CPU, "pin_memory": False})).pin_host_memory is False
    assert run(zero(3, offload_optimizer=CPU, offload_param={**CPU, "pin_memory": False})).pin_host_memory is False


def test_the_comms_logger_stays_off_unless_it_is_enabled() -> None:
    """DeepSpeed turns it on as soon as the key is there, whatever ``enabled`` says."""
    assert "comms_logger" not in run({"comms_logger": {"enabled": False, "verbose": True}}).deepspeed
    on = {"enabled": True, "prof_ops": ["all_reduce"]}
    assert run({"comms_logger": on}).deepspeed["comms_logger"] == on


# ---------------------------------------------------------------- files


def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        path = tmp_path / f"{encoding}.json"
        path.write_text(json.dumps(zero(1)), encoding=encoding)
        assert run(path).stage == run(str(path)).stage == 1


BROKEN = [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[1]", "not an object"), (b"3", "not an object"),
    (b'{"bf16": {"enabled": true, "enabled": false}}', "twice"),
    (b'{"steps_per_print": 1, "steps_per_print": 1}', "twice"),
    (b'{"gradient_clipping": NaN}', "NaN"), (b'{"gradient_clipping": -Infinity}', "Infinity"),
    (b"[" * 100_000, "not JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"), (b"\xff\xfe\x00", "cannot be read"),
    (b'{"gradient_clipping": 1e999}', "gradient_clipping"), (b'{\n"x\\ny\\u2028": 1}', "no key"),
]  # fmt: skip


@pytest.mark.parametrize("content, phrase", BROKEN, ids=range(len(BROKEN)))
def test_broken_files_are_one_line(content: bytes, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    assert phrase in refusal(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, "a\0b"):
        assert "cannot be read" in refusal(path)


# ---------------------------------------------------------------- fuzz

VALID = [
    *(json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))),
    {**adamw(lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0, torch_adam=True), "fp16": {"enabled": False}},
    {**zero(2, reduce_scatter=False), "gradient_predivide_factor": 2.0, "communication_data_type": "bf16",
     "comms_logger": {"enabled": True, "prof_ops": []}, "log_level": "info", "steps_per_print": 5},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 0.5, 5e8, -0.0, 1e999, float("nan"), 10**400, 10**6000, "auto", "cpu",
    "nvme", "two", "bf16", "AdamW", "", "a\nb\u2028c", "x" * 1000, [], [0.9, 0.5], [[]], {}, {"enabled": True},
    {"stage": 3}, {1: 2},
]  # fmt: skip
NAMES = ["stage", "scheduler", "train_batchsize", "", "a\nb", "zero_optimization", "x" * 500, 7, None, "enabled", "amp"]


def mutate(document: dict[Any, Any], source: random.Random) -> None:
    """Change, add or remove something at a random depth."""
    inside = [value for value in document.values() if isinstance(value, dict)]
    if inside and source.random() < 0.6:
        mutate(source.choice(inside), source)
        return
    names = [*document, *source.sample(NAMES, 2)]
    name = source.choice(names)
    if source.random() < 0.2:
        document.pop(name, None)
    else:
        document[name] = copy.deepcopy(source.choice(VALUES))


def test_random_mutations_resolve_or_are_refused_in_one_line() -> None:
    source = random.Random(0)
    resolved = 0
    for round_number in range(400):
        document = copy.deepcopy(source.choice(VALID))
        for _ in range(source.choice([0, 1, 1, 2, 3])):
            mutate(document, source)
        try:
            found = run(document, given=source.choice(["", "lr clip_grad"]))
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 400, round_number
            continue
        resolved += 1
        DeepSpeedZeroConfig(**found.deepspeed["zero_optimization"])
        batch = {**found.deepspeed, "train_batch_size": found.global_batch_size // 2}  # DeepSpeed sees one rank here
        DeepSpeedConfig(batch)
    assert 60 < resolved < 300
