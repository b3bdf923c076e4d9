"""Predicted bytes against the bytes that engines hold, for every stage, on one rank and on two."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megalowrank.engine.optimizer as optimizer_module
from megalowrank.config import ModelConfig, ParallelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.memory import current_memory, measured_bytes, memory_report, peak_memory
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.methods import method_class
from megalowrank.methods.base import Context, Method
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.memory import Bytes, predicted_bytes
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import Groups, initialize_groups, initialize_single_process
from tests.harness import run_ranks

CONFIG = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=301
)
SMALL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=301)
CONFIGS = {
    "llama": CONFIG,
    "gpt2": apply_preset(replace(SMALL, model_family="gpt2", max_position_embeddings=40), None),
    "neox": apply_preset(replace(SMALL, model_family="neox", ffn_hidden_size=96), None),
}
PERSISTENT = 5000
STATE = ("weights", "frozen W", "fold residual", "masters", "moments")


def build(bf16: bool, residual: str = "int16", family: str = "llama") -> tuple[Method, BuiltModel]:
    kind = method_class("switchlora")
    method = kind(kind.config_class(lora_rank=9, switch_interval=4, switch_freeze_steps=2))
    dtype = torch.bfloat16 if bf16 else torch.float32
    builder = build_llama if family == "llama" else build_gpt
    return method, builder(CONFIGS[family], method, length=9, seed=3, forward_dtype=dtype, fold_residual=residual)


def stored(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes of the storages of these tensors and their gradients by address, without those below 100 bytes."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for held in (tensor, tensor.grad if tensor is not None and tensor.is_leaf else None):
            if held is not None and not held.is_meta and held.untyped_storage().nbytes() >= 100:
                found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return found


def alive() -> list[torch.Tensor]:
    """Every tensor that python can see."""
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def gradient_bytes(engine: Any, known: Iterable[torch.Tensor | None], step: Callable[[], Any]) -> int:
    """The most that one update holds beside ``known``, as the backward pass ends or while AdamW runs."""
    moments: list[dict[int, int]] = []
    read, finish = optimizer_module._flat_gradient, engine.deepspeed.step

    def seen_by_adamw(partition: Any) -> torch.Tensor:
        flat = read(partition)
        moments.append(stored([*alive(), flat]))
        return flat

    def as_backward_ends() -> None:
        moments.append(stored(alive()))
        finish()

    optimizer_module._flat_gradient, engine.deepspeed.step = seen_by_adamw, as_backward_ends
    try:
        step()
    finally:
        optimizer_module._flat_gradient, engine.deepspeed.step = read, finish
    rest = stored(known)
    return max(sum(size for at, size in moment.items() if at not in rest) for moment in moments)


def known_tensors(engine: Any, method: Any, model: BuiltModel) -> list[torch.Tensor | None]:
    """Whatever a run holds that is no gradient."""
    parameters = list(model.module.parameters())
    found = [p.data for p in parameters] + [p.ds_tensor.data for p in parameters if hasattr(p, "ds_tensor")]
    found += [tensor for p in engine.state.partitions for tensor in (p.master.detach(), p.exp_avg, p.exp_avg_sq)]
    return [*found, *(layer.weight.residual for layer in model.layers), method.pools.buffer, model.module.angles]


def zero_case(case: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Predicted and measured bytes of one stage after two updates, on this rank."""
    earlier = alive()
    method, model = build(case["bf16"], family=case["family"])
    optimizer = VectorClockAdamW([p for p in model.module.parameters() if p.requires_grad])
    zero = {"stage": case["stage"], "reduce_bucket_size": 2, "stage3_param_persistence_threshold": PERSISTENT}
    offload = {"offload_optimizer": {"device": "cpu"}} if case["offload"] else {}
    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4 // groups.data_size,
        "bf16": {"enabled": case["bf16"]},
        "zero_optimization": {**zero, "memory_efficient_linear": False, **offload},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
    }  # fmt: skip
    engine = ZeroEngine(model.module, model.layers, optimizer, config, groups)
    ctx = Context(model.layers, engine.state, 3, 6, groups.data_rank, groups.data_size, host_allocator(False))
    method.start(ctx)
    rows = torch.randint(0, 301, (4, 10)).chunk(groups.data_size)[groups.data_rank]
    engine.train_step([rows], 1e-3)
    method.before_step(1, ctx)
    known = earlier + known_tensors(engine, method, model)
    most = gradient_bytes(engine, known, lambda: engine.train_step([rows], 1e-3))
    layout = Layout(
        case["stage"], case["bf16"], groups.data_size, offload_optimizer=case["offload"], candidates="host",
        persistence_threshold=PERSISTENT,
    )  # fmt: skip
    predicted = predicted_bytes(CONFIGS[case["family"]], method.adapters(), layout)
    measured = measured_bytes(engine, method, model.layers)
    engine.close()
    return {"predicted": {name: size.total for name, size in predicted.items()}, "measured": measured, "most": most}


def measure(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run by every rank."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig())
    found = []
    for case in cases:
        found.append(zero_case(case, groups))
        gc.collect()
    return found


def case_of(stage: int, bf16: bool, offload: bool = False, family: str = "llama") -> dict[str, Any]:
    return {"stage": stage, "bf16": bf16, "offload": offload, "family": family}


def check_state(result: dict[str, Any], case: dict[str, Any]) -> None:
    predicted, measured = result["predicted"], result["measured"]
    for name in (*STATE, "candidates (host)"):
        assert measured[name] == pytest.approx(predicted[name], rel=0.01), (case, name)
    assert measured["moments"] > 0 and measured["frozen W"] > 0 and measured["candidates (host)"] > 0
    assert (measured["fold residual"] > 0) == case["bf16"]


def test_one_rank_holds_what_was_predicted(tmp_path: Path) -> None:
    cases = [case_of(stage, bf16) for stage in range(4) for bf16 in (False, True)]
    cases += [case_of(stage, True, offload=True) for stage in (1, 2, 3)]
    cases += [case_of(stage, True, family=family) for family in ("gpt2", "neox") for stage in (0, 2, 3)]
    (results,) = run_ranks("tests.engine.test_memory:measure", 1, cases, tmp_path)
    for case, result in zip(cases, results, strict=True):
        check_state(result, case)
        predicted = result["predicted"]["gradients"] + result["predicted"]["offload staging"]
        assert result["most"] == pytest.approx(predicted, rel=0.01), case


def test_each_of_two_ranks_holds_what_was_predicted(tmp_path: Path) -> None:
    cases = [case_of(1, False), case_of(3, True), case_of(1, True, family="gpt2"), case_of(3, True, family="neox")]
    cases.append(case_of(3, True, family="gpt2"))
    ranks = run_ranks("tests.engine.test_memory:measure", 2, cases, tmp_path)
    for case, first, second in zip(cases, *ranks, strict=True):
        check_state(first, case)
        same = {name: second["measured"][name] for name in STATE}
        assert same == pytest.approx({name: first["measured"][name] for name in STATE}, rel=0.01)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))
        yield


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("bf16", "residual"), [(False, "int16"), (True, "int16"), (True, "int8"), (True, "none")])
def test_dense_engine_holds_what_was_predicted(one_process: None, bf16: bool, residual: str, family: str) -> None:
    method, model = build(bf16, residual, family)
    if bf16:
        model.module.bfloat16()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    engine = DenseEngine(model.module, model.layers, VectorClockAdamW(parameters), 0.0)
    method.start(Context(model.layers, engine.state, 3, 6, 0, 1, host_allocator(False)))
    engine.train_step([torch.randint(0, 301, (2, 10))], 1e-3)
    layout = Layout(None, bf16, residual=residual, candidates="host")
    predicted = predicted_bytes(CONFIGS[family], method.adapters(), layout)
    measured = measured_bytes(engine, method, model.layers)
    assert measured == {name: predicted[name].total for name in measured}
    lines = memory_report(predicted, measured)
    assert len({len(line) for line in lines}) == 1
    shown = {name for name in (*STATE, "gradients", "candidates (host)") if predicted[name].total}
    assert len(lines) == 1 + len(shown)
    assert all(line.endswith(("+0.00 %", "-")) for line in lines[1:])


def test_report_says_what_differs() -> None:
    lines = memory_report({"masters": Bytes(1000, 24), "moments": Bytes()}, {"masters": 1280, "moments": 0, "x": 5})
    assert [line.split() for line in lines[1:]] == [
        ["masters", "1.0", "KiB", "1.2", "KiB", "+25.00", "%"],
        ["x", "-", "5", "B", "-"],
    ]


def test_process_memory_grows_with_what_is_held() -> None:
    cpu = torch.device("cpu")
    before = current_memory(cpu)
    held = torch.ones(16 << 20)
    assert current_memory(cpu) - before > 0.9 * held.numel() * 4
    assert peak_memory(cpu) >= 0.99 * current_memory(cpu)
