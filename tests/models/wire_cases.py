"""Ranks of test_wire_bytes: real updates of small models, their collectives, memory, activations and FLOPs.

A case is a JSON object: ``family``, ``method``, ``flags`` of the method, ``bf16``, ``tensor``, ``pipe``, ``sequence``,
``schedules`` (per fused projection), ``accumulation``, ``recompute``, ``zero`` (``zero_optimization``), ``deepspeed``
(other keys of the DeepSpeed JSON), ``decay`` and ``length``.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine.memory import measured_bytes
from megalowrank.engine.setup import make_engine
from megalowrank.engine.zero import host_allocator, initialize_distributed
from megalowrank.methods import method_class
from megalowrank.methods.base import Context, Method
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.models.stages import split_layers
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.traffic import Traffic
from tests.models.kept import Kept, Peak

LENGTH, ROWS, STEPS = 16, 3, 4
SMALL = ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=4, vocab_size=31)
FAMILIES = {
    "llama": apply_preset(replace(SMALL, ffn_hidden_size=21, num_query_groups=2), None),
    "gpt2": apply_preset(replace(SMALL, model_family="gpt2", max_position_embeddings=20), None),
    "neox": apply_preset(replace(SMALL, model_family="neox", ffn_hidden_size=27, rotary_percent=0.5), None),
}
FAMILIES["llama, task"] = apply_preset(replace(FAMILIES["llama"], num_labels=3), None)
FAMILIES["gpt2, task"] = apply_preset(replace(FAMILIES["gpt2"], num_labels=1), None)


def method_of(case: dict[str, Any]) -> Method:
    kind = method_class(case["method"])
    return kind(kind.config_class(**case.get("flags", {})))


def length_of(case: dict[str, Any]) -> int:
    return case.get("length", LENGTH)


def train_of(case: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        method=case["method"], seq_length=length_of(case), train_iters=STEPS, lr=1e-3, bf16=case.get("bf16", False),
        weight_decay=case.get("decay", 0.0), recompute_granularity="full" if case.get("recompute") else "none",
    )  # fmt: skip


def built(case: dict[str, Any], method: Method, groups: Groups) -> BuiltModel:
    config, train = FAMILIES[case["family"]], train_of(case)
    blocks, recompute = None, bool(case.get("recompute"))
    if groups.pipe_size > 1:
        found = split_layers(config, method.adapters(), groups.pipe_size, length_of(case), recompute)
        blocks = found[groups.pipe_rank]
    place = Placement(
        groups.wire(), blocks, groups.pipe_rank == 0, groups.pipe_rank == groups.pipe_size - 1,
        {name: schedule == "ride" for name, schedule in case.get("schedules", {}).items()},
    )  # fmt: skip
    builder = build_llama if case["family"].startswith("llama") else build_gpt
    return builder(
        config, method, length=length_of(case), seed=3, recompute=recompute,
        forward_dtype=torch.bfloat16 if train.bf16 else torch.float32, place=place,
    )  # fmt: skip


def deepspeed_config(case: dict[str, Any], groups: Groups) -> dict[str, Any]:
    micro = case.get("accumulation", 1)
    return {
        "train_batch_size": ROWS * micro * groups.data_size, "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro, "gradient_clipping": 1.0,
        "bf16": {"enabled": case.get("bf16", False), "check_grad_overflow": True},
        "zero_optimization": {"memory_efficient_linear": False, **case["zero"]},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
        **case.get("deepspeed", {}),
    }  # fmt: skip


def rows_of(labelled: bool, length: int, source: torch.Generator) -> torch.Tensor:
    """A micro-batch of text, or of a task: its last two columns are lengths and labels."""
    if not labelled:
        return torch.randint(0, 31, (ROWS, length + 1), generator=source)
    rows = torch.randint(0, 31, (ROWS, length + 2), generator=source)
    rows[:, -2], rows[:, -1] = torch.tensor([1, length, length // 2]), torch.tensor([0, 2, 1])
    return rows


def kept_bytes(model: BuiltModel, length: int) -> int:
    """What autograd keeps of one micro-batch of this stage, in float32."""
    part, known = model.module, [*model.module.parameters()]
    known += [] if part.angles is None else [part.angles]
    tokens, labels = part.parted(rows_of(part.labelled, length, torch.Generator().manual_seed(0)))
    part.train()
    with Kept(known) as kept:
        if part.place.begins:
            hidden = part.embed(tokens)
        else:
            own = length // part.wire.size if part.wire.sequence else length
            hidden = torch.randn(own, ROWS, 16, requires_grad=True)
        hidden = part.run_blocks(hidden)
        if part.place.ends:
            hidden = part.loss(part.head(hidden), labels)
    return kept.nbytes


def counted_flops(step: Any) -> int:
    """FLOPs that torch counts in ``step``; it has no formula for the in-place addmm, and skips the fused attention."""

    def in_place(output: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        step()
    return counter.get_total_flops()


def watch_buckets(engine: Any) -> list[int]:
    """Bytes of the buffers in which DeepSpeed gathers gradients: now (ZeRO-3), and whenever they are given back."""
    zero, sizes = engine.deepspeed.optimizer, [0]
    release = getattr(zero, "_release_ipg_buffers", lambda: None)

    def note() -> None:
        found: list[torch.Tensor] = []
        for bucket in getattr(zero, "ipg_buckets", {}).values():
            found += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        sizes.append(sum(buffer.numel() * buffer.element_size() for buffer in found))

    def noted() -> None:
        note()
        release()

    note()
    zero._release_ipg_buffers = noted
    return sizes


def switched(method: Method, model: BuiltModel) -> dict[str, int]:
    """Vectors of A that every matrix has switched so far, and as many of B; none for a method that does not switch."""
    counts = getattr(method, "switched", None)
    return {} if counts is None else {layer.name: int(counts[j]) for j, layer in enumerate(model.layers)}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The collectives of the last update, and what this rank held and computed. Collective."""
    parallel = ParallelConfig(case.get("tensor", 1), case.get("pipe", 1), case.get("sequence", False))
    groups = initialize_groups(parallel)
    method = method_of(case)
    model = built(case, method, groups)
    kept, vocabulary = kept_bytes(model, length_of(case)), model.module.vocabulary
    padded = vocabulary.real < vocabulary.padded and not model.module.labelled
    mask = vocabulary.padded if model.module.place.ends and padded else 0
    settings = deepspeed_config(case, groups)
    engine = make_engine(model, FAMILIES[case["family"]], train_of(case), settings, groups)
    ctx = Context(
        model.layers, engine.state, 3, STEPS, groups.data_rank, groups.data_size, host_allocator(False), engine=engine
    )
    method.start(ctx)
    sizes = watch_buckets(engine)
    source = torch.Generator().manual_seed(groups.data_rank)
    count, labelled = case.get("accumulation", 1), model.module.labelled
    batches = [rows_of(labelled, length_of(case), source) for _ in range(count)]
    ctx.micro_batches = batches
    flops = counted_flops(lambda: engine.train_step(batches, 1e-3))
    refresh = Traffic(groups.labels())
    for step in range(STEPS):
        traffic, before = Traffic(groups.labels()), switched(method, model)
        if step == 0:
            with refresh:
                method.before_step(step, ctx)
            engine.train_step(batches, 1e-3)
            continue
        with traffic:
            method.before_step(step, ctx)
            engine.train_step(batches, 1e-3)
    gc.collect()
    with Peak() as peak:
        engine.train_step(batches, 1e-3)
    found = {
        "peak": peak.most,
        "volumes": {f"{group}: {name}": [v.calls, v.payload] for (group, name), v in traffic.take().items()},
        "refresh": {f"{group}: {name}": [v.calls, v.payload] for (group, name), v in refresh.take().items()},
        "moved": {name: count - before[name] for name, count in switched(method, model).items()},
        "memory": measured_bytes(engine, method, model.layers), "kept": kept, "flops": flops, "mask": mask,
        "buckets": max(sizes), "stage": groups.pipe_rank, "first": groups.data_rank == 0,
    }  # fmt: skip
    engine.close()
    gc.collect()
    return found


def measure_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run by every rank."""
    initialize_distributed(None)
    return [measure(case) for case in cases]
