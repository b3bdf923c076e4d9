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
from megalowrank.models.accounting.activations import kept_by_micro_batch
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
    "opt": apply_preset(replace(SMALL, model_family="opt", max_position_embeddings=29), None),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def build(
    method_name: str, family: str, bf16: bool, recompute: bool, vocabulary: int | None = None, **flags: Any
) -> tuple[Method, BuiltModel]:
    kind = method_class(method_name)
    method = kind(kind.config_class(**flags))
    builder = build_llama if family == "llama" else build_gpt
    config = replace(FAMILIES[family], vocab_size=vocabulary or FAMILIES[family].vocab_size)
    model = builder(config, method, length=LENGTH, seed=1, recompute=recompute)
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


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_the_loss(recompute: bool, bf16: bool) -> None:
    """With a large vocabulary the most is held while the loss is computed."""
    method, model = build("lora", "gpt2", bf16, recompute, 4000, lora_rank=5)
    config = replace(FAMILIES["gpt2"], vocab_size=4000)
    kept = kept_by_micro_batch(config, method.adapters(), layout_of(bf16, recompute))
    with Peak() as peak:
        loss = model.module(tokens())
    predicted = kept.most(1, recompute) + kept.workspace(1, recompute)
    assert peak.most == pytest.approx(predicted, rel=0.01)
    assert peak.now < peak.most or not bf16
    loss.backward()


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_peak_of_recomputed_blocks(family: str) -> None:
    """Many blocks that are recomputed: their inputs, all of one block, and a little of its backward pass."""
    method, model = build("lora", family, True, True, lora_rank=1)
    kept = kept_by_micro_batch(FAMILIES[family], method.adapters(), layout_of(True, True))
    with Peak() as peak:
        loss = model.module(tokens())
        peak.most = 0
        loss.backward()
    gradients = sum(2 * p.numel() for p in model.module.parameters() if p.requires_grad)
    predicted = kept.most(1, True) + kept.workspace(1, True)
    assert 0.9 * predicted < peak.most < 1.1 * predicted + gradients
