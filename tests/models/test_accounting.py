"""Counted parameters, FLOPs and candidates against the built model and torch's own FLOP counter."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods import method_class
from megalowrank.methods.base import Adapters, Method
from megalowrank.models.accounting.estimate import estimate
from megalowrank.models.accounting.flops import (
    flops_breakdown,
    flops_per_token,
    model_flops_per_token,
    peak_flops,
)
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.memory import predicted_bytes
from megalowrank.models.accounting.parameters import GROUPS, count_parameters
from megalowrank.models.accounting.table import human, startup_table
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import initialize_single_process

CONFIG = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=44, num_attention_heads=4, num_query_groups=2, vocab_size=70
)
LENGTH, ROWS = 24, 3
SMALL = ModelConfig(num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=70)
FAMILIES = {
    "llama": CONFIG,
    "gpt2": apply_preset(replace(SMALL, model_family="gpt2", max_position_embeddings=29), None),
    "neox": apply_preset(replace(SMALL, model_family="neox", ffn_hidden_size=44), None),
    "llama, tied": replace(CONFIG, tie_word_embeddings=True),
    "gpt2, not tied": apply_preset(replace(SMALL, model_family="gpt2", tie_word_embeddings=False), None, LENGTH),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"lora_rank": 5}),
    "some": ("lora", {"lora_rank": 5, "lora_target": ["layers.1.*", "o"]}),
    "switchlora": ("switchlora", {"lora_rank": 6}),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def build(case: str, family: str, recompute: bool = False) -> tuple[Method, BuiltModel]:
    name, flags = CASES[case]
    kind = method_class(name)
    method = kind(kind.config_class(**flags))
    builder = build_llama if family.startswith("llama") else build_gpt
    return method, builder(FAMILIES[family], method, length=LENGTH, seed=1, recompute=recompute)


def adapters_of(method: str, **flags: Any) -> Adapters | None:
    kind = method_class(method)
    return kind(kind.config_class(**flags)).adapters()


def group_of(name: str) -> str:
    """The group of a logical tensor, from its name."""
    if name.rsplit(".", 1)[-1] in ("A", "B"):
        return "factors"
    if "norm" in name:
        return "norms"
    return name.split(".")[2] if name.startswith("layers.") else name.split(".")[0].replace("position", "embedding")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_the_built_model(case: str, family: str) -> None:
    method, model = build(case, family)
    count = count_parameters(FAMILIES[family], method.adapters())
    expected = dict.fromkeys(GROUPS, 0)
    for tensor in model.tensors:
        expected[group_of(tensor.name)] += math.prod(tensor.shape)
    assert count.groups == expected
    parameters = list(model.module.parameters())
    assert count.total == sum(p.numel() for p in parameters)
    assert count.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert count.adapted == sum(p.numel() for p in parameters if not p.requires_grad)
    assert count.factors == sum(layer.A.numel() + layer.Bt.numel() for layer in model.layers)
    shapes = [(layer.out_features, layer.in_features, layer.rank) for layer in model.layers]
    assert count.candidates == sum((min(m, n) - r) * (m + n) for m, n, r in shapes)


def measured_flops(model: BuiltModel, backend: SDPBackend) -> float:
    """FLOPs per token that torch counts in one forward and backward pass.

    torch has no formula for the in-place addmm, which is given here: addmm(y [n, m], u [n, k], v [k, m]).
    """

    def in_place(output: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    tokens = torch.randint(0, CONFIG.vocab_size or 0, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mapping = {torch.ops.aten.addmm_: in_place}
    model.module.train()
    with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model.module(tokens).backward()
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_torch_counts(case: str, family: str, recompute: bool) -> None:
    """torch does not count the fused CPU attention; with plain products it counts the whole square."""
    method, model = build(case, family, recompute)
    parts = flops_breakdown(FAMILIES[family], method.adapters(), LENGTH, recompute)
    attention = parts["attention"] * (4 / 3 if recompute else 1)
    total = flops_per_token(FAMILIES[family], method.adapters(), LENGTH, recompute)
    without = measured_flops(model, SDPBackend.FLASH_ATTENTION)
    square = measured_flops(model, SDPBackend.MATH) - without
    assert without == pytest.approx(total - attention, rel=1e-9)
    assert square == pytest.approx(2 * attention, rel=1e-9)


def test_full_rank_flops_are_six_per_parameter_and_attention() -> None:
    config = apply_preset(ModelConfig(preset="llama_350m"), None)
    count = count_parameters(config, None)
    matrices = count.total - count.groups["embedding"] - count.groups["norms"]
    expected = 6 * matrices + 6 * 512 * 1024 * 24
    assert model_flops_per_token(config, 512) == expected
    lora = flops_per_token(config, adapters_of("lora", lora_rank=128), 512)
    assert 0.75 * expected < lora < expected
    assert flops_per_token(config, None, 512, recompute=True) > 1.2 * expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12), ("Tesla V100-SXM2-32GB", 125e12), ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA GH200 480GB", 989e12), ("cpu", None), ("NVIDIA A10", None), ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_zero_shares_what_it_shards() -> None:
    """Eight ranks of a 350M model: what is sharded is an eighth, what is not stays whole."""
    config, adapters = apply_preset(ModelConfig(preset="llama_350m"), None), adapters_of("lora", lora_rank=128)
    count = count_parameters(config, adapters)
    shared = {"masters": (0, 1, 1, 1), "moments": (0, 1, 1, 1), "weights": (0, 0, 0, 1), "frozen W": (0, 0, 0, 1)}
    whole = {
        "masters": 4 * count.trainable, "moments": 8 * count.trainable,
        "weights": 2 * count.trainable, "frozen W": 2 * count.adapted,
    }  # fmt: skip
    for stage in range(4):
        found = predicted_bytes(config, adapters, Layout(stage, True, 8, persistence_threshold=0))
        for name, sharded in shared.items():
            assert found[name].device == pytest.approx(whole[name] / (8 if sharded[stage] else 1), rel=1e-4)
            assert found[name].host == 0
        assert found["fold residual"].total == found["frozen W"].total
    small = Layout(3, True, 8)
    assert predicted_bytes(config, adapters, small)["weights"].device > whole["weights"] / 8


def test_offload_moves_state_to_the_host() -> None:
    config, adapters = apply_preset(ModelConfig(preset="llama_350m"), None), adapters_of("switchlora", lora_rank=128)
    here = predicted_bytes(config, adapters, Layout(3, True, 4, candidates="device"))
    there = predicted_bytes(
        config, adapters, Layout(3, True, 4, offload_optimizer=True, offload_param=True, candidates="host")
    )
    for name in ("masters", "moments", "gradients"):
        assert (there[name].device, there[name].host) == (0, here[name].device)
    shards = -(-count_parameters(config, adapters).adapted // 4) * 2
    assert there["frozen W"].host == pytest.approx(shards) and there["fold residual"].host == pytest.approx(shards)
    assert there["candidates (host)"].host == here["candidates (device)"].device
    assert there["candidates (host)"].host == pytest.approx(count_parameters(config, adapters).candidates)


def test_bytes_of_the_residual_follow_its_type() -> None:
    adapters = adapters_of("lora", lora_rank=4)
    frozen = count_parameters(CONFIG, adapters).adapted
    for residual, size in (("none", 0), ("int8", 1), ("int16", 2)):
        found = predicted_bytes(CONFIG, adapters, Layout(0, True, residual=residual))
        assert found["fold residual"].device == size * frozen
        assert predicted_bytes(CONFIG, adapters, Layout(0, False, residual=residual))["fold residual"].total == 0


def test_startup_table_is_aligned_and_says_what_it_counts() -> None:
    adapters = adapters_of("switchlora", lora_rank=4)
    layout = Layout(2, True, 2, offload_optimizer=True, candidates="host")
    table = startup_table(estimate(CONFIG, adapters, layout))
    count = count_parameters(CONFIG, adapters)
    lines = table.splitlines()
    assert any(line.startswith("trainable") and f"{count.trainable:,}" in line for line in lines)
    assert f"{100 * count.trainable / count.total:.2f}%" in table
    blocks = [block.splitlines() for block in table.split("\n\n")]
    assert [len({len(line) for line in block}) for block in blocks] == [1, 1, 1]
    for name in ("weights", "masters", "moments", "candidates (host)", "offload staging"):
        assert any(line.startswith(name) for line in lines)


def test_human_units() -> None:
    sizes = {0: "-", 1: "1 B", 1023: "1023 B", 1024: "1.0 KiB", 3 * 2**30: "3.0 GiB", 5 * 2**40: "5.00 TiB"}
    assert {size: human(size) for size in sizes} == sizes


def test_patterns_are_checked() -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        count_parameters(CONFIG, adapters_of("lora", lora_rank=4, lora_target=["nothing"]))
    with pytest.raises(ConfigError, match="splits the fused projection"):
        flops_per_token(CONFIG, adapters_of("lora", lora_rank=4, lora_target=["q"]), LENGTH)
