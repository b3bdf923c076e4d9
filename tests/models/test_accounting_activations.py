"""Predicted activations against what autograd keeps, on one rank."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.methods import method_class
from megalowrank.methods.base import Method
from megalowrank.models.accounting.activations import kept_by_micro_batch, logits_workspace
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import initialize_single_process
from tests.models.kept import Kept, Peak

LENGTH, ROWS = 24, 3
LLAMA = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=44, num_attention_heads=4, num_query_groups=2, vocab_size=70
)
SMALL = ModelConfig(num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=70)
FAMILIES = {
    "llama": apply_preset(LLAMA, None),
    "gpt2": apply_preset(replace(SMALL, model_family="gpt2", max_position_embeddings=29), None),
    "neox": apply_preset(replace(SMALL, model_family="neox", ffn_hidden_size=44), None),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def build(method_name: str, family: str, bf16: bool, recompute: bool, **flags: Any) -> tuple[Method, BuiltModel]:
    kind = method_class(method_name)
    method = kind(kind.config_class(**flags))
    builder = build_llama if family == "llama" else build_gpt
    model = builder(FAMILIES[family], method, length=LENGTH, seed=1, recompute=recompute)
    if bf16:
        model.module.bfloat16()
    model.module.train()
    return method, model


def layout_of(bf16: bool, recompute: bool = False) -> Layout:
    return Layout(
        None, bf16, micro_batch=ROWS, seq_length=LENGTH, recompute=recompute, accelerator=False
    )  # fmt: skip


def known(model: BuiltModel) -> list[torch.Tensor]:
    angles = [] if model.module.angles is None else [model.module.angles]
    return [*model.module.parameters(), *angles]


def tokens() -> torch.Tensor:
    return torch.randint(0, 70, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method_name", ["full", "lora"])
def test_a_forward_pass_keeps_what_was_predicted(method_name: str, family: str, recompute: bool, bf16: bool) -> None:
    flags = {"lora_rank": 5, "lora_target": ["layers.1.*", "o"]} if method_name == "lora" else {}
    method, model = build(method_name, family, bf16, recompute, **flags)
    batch = tokens()
    with Kept(known(model)) as kept:
        loss = model.module(batch)
    found = kept_by_micro_batch(FAMILIES[family], method.adapters(), layout_of(bf16, recompute))
    blocks = 3 * found.block_input if recompute else sum(found.blocks)
    assert kept.nbytes == found.begin + blocks + found.end
    loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_a_micro_batch(family: str, recompute: bool) -> None:
    method, model = build("lora", family, True, recompute, lora_rank=5)
    layout = layout_of(True, recompute)
    with Peak() as peak:
        model.module(tokens()).backward()
    kept = kept_by_micro_batch(FAMILIES[family], method.adapters(), layout).most(1, recompute)
    gradients = sum(2 * p.numel() for p in model.module.parameters() if p.requires_grad)
    print(family, recompute, peak.most, kept, logits_workspace(FAMILIES[family], layout), gradients)
