"""Shortcuts: nothing at the start, and what they are said to compute afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods.heterolora import HeteroLoRA, HeteroLoRAConfig
from megalowrank.methods.lora import LoRA, LoRAConfig
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.models.transformer import Transformer
from megalowrank.parallel.groups import initialize_single_process

SHAPE = {"num_layers": 3, "hidden_size": 12, "ffn_hidden_size": 18, "num_attention_heads": 2, "vocab_size": 29}
TOKENS = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
TABLE = """granularity = "layer"
[default]
enabled = false
[layers.1.q]
[layers.1.cross_cut]
rank = 2
"""


@pytest.fixture(autouse=True)
def single(tmp_path: Path) -> None:
    initialize_single_process(str(tmp_path / "store"))


def built(family: str, mode: str, **flags: object) -> BuiltModel:
    config = ModelConfig(**SHAPE, model_family=family)  # type: ignore[arg-type]
    build = build_llama if family == "llama" else build_gpt
    if mode == "lora":
        return build(config, LoRA(LoRAConfig(3, 16.0, "classic")), length=9, seed=1, dtype=torch.float64)
    method = HeteroLoRA(HeteroLoRAConfig(lora_rank=3, hetero_shortcuts=mode, **flags))  # type: ignore[arg-type]
    return build(config, method, length=9, seed=1, dtype=torch.float64)


def by_hand(module: Transformer, hidden: torch.Tensor) -> torch.Tensor:
    """The blocks, put together from their parts with every shortcut as a product of matrices."""
    angles, before = (None if module.angles is None else module.angles[: len(hidden)]), None
    for block in module.layers:
        P = {
            kind: s.factors.scale * s.Bt.t() @ s.A if s.factors.enabled else torch.zeros(12, 12, dtype=torch.float64)
            for kind, s in block.shortcuts.items()
        }
        x = hidden
        attention = block.self_attention(block.input_layernorm(x), attention_mask=None, rotary_pos_emb=angles)[0]
        middle = x + attention + x @ P["residual_1"].t()
        if before is not None:
            middle = middle + before @ P["cross_cut"].t()
        hidden = middle + block.mlp(block.pre_mlp_layernorm(middle))[0] + middle @ P["residual_2"].t()
        hidden, before = hidden + x @ P["cross_in"].t(), middle
    return hidden


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_they_compute(family: str) -> None:
    plain, model = built(family, "lora"), built(family, "combined")
    assert len(model.layers) == len(plain.layers) + 3 * 4 - 1
    assert torch.equal(model.module.logits(TOKENS), plain.module.logits(TOKENS)), "at the start they are nothing"
    shortcuts = [layer for layer in model.layers if layer.is_shortcut]
    source = torch.Generator().manual_seed(2)
    for number, layer in enumerate(shortcuts):
        layer.Bt.data.normal_(0.0, 0.3, generator=source)
        layer.enabled = number % 4 != 1
    hidden = model.module.embed(TOKENS)
    found, expected = model.module.run_blocks(hidden), by_hand(model.module, hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=source)
    leaves = [p for layer in shortcuts for p in (layer.A, layer.Bt)] + [model.module.embedding.weight]
    own = torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True)
    other = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=0, atol=1e-11)
    model.module.train()
    model.module.recompute = True
    torch.testing.assert_close(model.module.run_blocks(hidden), expected, rtol=0, atol=1e-12)


def test_a_table_names_the_ones_that_are_built() -> None:
    model = built("llama", "separated", lora_config=TABLE, hetero_interval=0)
    assert model.names == ("layers.1.attention.q", "layers.1.shortcut.cross_cut")
    assert [(layer.name, layer.rank, layer.scale) for layer in model.layers] == [
        ("layers.1.attention.q", 3, 16 / 3), ("layers.1.shortcut.cross_cut", 2, 8.0),
    ]  # fmt: skip
    linears = [p for name, p in model.module.named_parameters() if "linear" in name and name.endswith("weight")]
    assert len(linears) == 12 and not any(p.requires_grad for p in linears)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="attention before the MLP; got --model-family neox"):
        built("neox", "combined")
    with pytest.raises(ConfigError, match=r"matrix that the model lacks.*cross_cut"):
        built("llama", "off", lora_config=TABLE)
