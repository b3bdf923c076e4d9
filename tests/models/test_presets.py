"""Published sizes against published totals and transformers' own count; defaults and refusals of the families."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.models.accounting.parameters import count_parameters
from megalowrank.models.architecture import FAMILIES, GPT_FAMILIES, LLAMA_FAMILIES
from megalowrank.models.presets import GPT2, LLAMA, OPT, PRESETS, PYTHIA, apply_preset

# model cards of openai-community and EleutherAI; OPT without the two rows of positions that only padding reads
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200,
    "pythia_14m": 14_067_712, "pythia_31m": 30_494_720, "pythia_70m": 70_426_624, "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016, "pythia_1b": 1_011_781_632, "pythia_1.4b": 1_414_647_808,
    "pythia_2.8b": 2_775_208_960, "pythia_6.9b": 6_857_302_016, "pythia_12b": 11_846_072_320,
    "opt_125m": 125_237_760, "opt_1.3b": 1_315_753_984,
}  # fmt: skip
# size of a head, which decides no total
HEADS = {
    "pythia_14m": 32, "pythia_31m": 32, "pythia_1b": 256, "pythia_1.4b": 128, "pythia_2.8b": 80, "pythia_6.9b": 128,
    "pythia_12b": 128,
}  # fmt: skip
SMALL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50)


def refusal(config: ModelConfig, *, length: int | None = None, families: tuple[str, ...] = FAMILIES) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_preset(config, None, length, families)
    return str(caught.value)


def on_meta(config: ModelConfig) -> int:
    """Parameters that transformers counts for the same sizes, without memory for them."""
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    blocks = {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_attention_heads}
    with torch.device("meta"):
        if config.model_family == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **blocks, n_positions=config.max_position_embeddings))
        elif config.model_family == "opt":
            positions = {"max_position_embeddings": (config.max_position_embeddings or 0) - 2}
            model = OPTForCausalLM(OPTConfig(**sizes, **blocks, ffn_dim=config.ffn_hidden_size, **positions))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **blocks, intermediate_size=config.ffn_hidden_size))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*GPT2, *PYTHIA, *OPT])
def test_parameters_of_a_preset_are_the_published_ones(name: str) -> None:
    config = apply_preset(ModelConfig(preset=name), None)
    assert count_parameters(config, None).total == PUBLISHED[name] == on_meta(config)
    assert (config.hidden_size or 0) / (config.num_attention_heads or 1) == HEADS.get(name, 64)


def test_every_gpt_preset_has_its_published_total() -> None:
    assert PUBLISHED.keys() == {*GPT2, *PYTHIA, *OPT} and PRESETS.keys() == {*LLAMA, *PUBLISHED}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"norm_epsilon": 1e-5, "ffn_hidden_size": 128, "num_query_groups": 4, "max_position_embeddings": 9,
                  "rotary_percent": None, "rotary_base": None}),
        ("neox", {"norm_epsilon": 1e-5, "ffn_hidden_size": 128, "num_query_groups": 4, "max_position_embeddings": None,
                  "rotary_percent": 0.25, "rotary_base": 10000.0}),
        ("llama", {"norm_epsilon": 1e-6, "ffn_hidden_size": 40, "num_query_groups": 4, "max_position_embeddings": None,
                   "rotary_percent": 1.0, "rotary_base": 10000.0}),
        ("opt", {"norm_epsilon": 1e-5, "ffn_hidden_size": 128, "num_query_groups": 4, "max_position_embeddings": 9,
                 "rotary_percent": None, "tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_defaults_follow_the_family(family: str, expected: dict[str, Any]) -> None:
    more = {"ffn_hidden_size": 40} if family == "llama" else {}
    found = apply_preset(dataclasses.replace(SMALL, model_family=family, **more), None, 9)
    assert {name: getattr(found, name) for name in expected} == expected and found.model_family == family
    assert apply_preset(found, None, 9) == found, "what is resolved resolves to itself"


def test_the_family_comes_from_the_flag_the_preset_or_the_program() -> None:
    assert apply_preset(SMALL, None, 9, GPT_FAMILIES).model_family == "gpt2"
    chosen = dataclasses.replace(SMALL, model_family="neox")
    assert apply_preset(chosen, None, 9, GPT_FAMILIES).model_family == "neox"
    assert apply_preset(ModelConfig(preset="pythia_70m"), None, 9, GPT_FAMILIES).model_family == "neox"
    assert apply_preset(ModelConfig(preset="llama_9m"), None, 9, LLAMA_FAMILIES).model_family == "llama"


def test_vocabularies_are_taken_as_they_are() -> None:
    assert apply_preset(ModelConfig(preset="gpt2"), None).vocab_size == 50257
    assert apply_preset(ModelConfig(preset="gpt2"), 333).vocab_size == 333
    assert apply_preset(ModelConfig(preset="pythia_14m", vocab_size=50257), 333).vocab_size == 50257


def test_flags_override_a_preset() -> None:
    found = apply_preset(
        ModelConfig(preset="gpt2", num_layers=2, ffn_hidden_size=100, max_position_embeddings=64), None, 64
    )
    assert (found.num_layers, found.ffn_hidden_size, found.max_position_embeddings) == (2, 100, 64)
    assert apply_preset(ModelConfig(preset="gpt2"), None, 64).max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gpt2", "num_query_groups", 2), ("gpt2", "rotary_percent", 0.25), ("gpt2", "rotary_base", 500.0),
        ("neox", "num_query_groups", 2), ("neox", "max_position_embeddings", 64),
        ("llama", "max_position_embeddings", 64),
    ],
)  # fmt: skip
def test_what_a_family_cannot_use_is_refused_by_name(family: str, name: str, value: float) -> None:
    config = dataclasses.replace(SMALL, model_family=family, ffn_hidden_size=40, **{name: value})
    message = refusal(config, length=9)
    assert message.startswith(f"--{name.replace('_', '-')} ") and family in message and f"got {value}" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_family": "gpt3"}, "--model-family unknown 'gpt3' gpt2"),
        ({"preset": "gpt2", "model_family": "neox"}, "--model-family contradicts --preset gpt2 neox"),
        ({"preset": "pythia_70m", "model_family": "gpt2"}, "--model-family contradicts --preset pythia_70m neox"),
        ({"preset": "pythia-70m"}, "--preset unknown pythia_70m"),
        ({"max_position_embeddings": 8}, "--max-position-embeddings shorter --seq-length 8 9"),
        ({"max_position_embeddings": 0}, "--max-position-embeddings 0"),
        ({"model_family": "neox", "rotary_percent": 0.0}, "--rotary-percent 0.0"),
        ({"model_family": "neox", "rotary_percent": 1.5}, "--rotary-percent 1.5"),
        ({"model_family": "neox", "rotary_percent": float("nan")}, "--rotary-percent nan"),
        ({"model_family": "neox", "rotary_percent": 0.1}, "--rotary-percent --hidden-size even 0"),
        ({"model_family": "neox", "rotary_percent": 0.4}, "--rotary-percent --num-attention-heads even 3"),
        ({"model_family": "neox", "rotary_base": 0.0}, "--rotary-base 0.0"),
        ({"norm_epsilon": -1.0}, "--norm-epsilon -1.0"),
        ({"hidden_size": None}, "--hidden-size missing"),
    ],
)
def test_contradictions_and_bad_values_are_refused_by_name(changes: dict[str, Any], parts: str) -> None:
    message = refusal(dataclasses.replace(SMALL, **changes), length=9, families=GPT_FAMILIES)
    assert all(part in message for part in parts.split()), message


def test_a_program_refuses_the_families_of_the_other() -> None:
    assert "--model-family" in refusal(dataclasses.replace(SMALL, model_family="neox"), families=LLAMA_FAMILIES)
    assert "--preset gpt2_xl" in refusal(ModelConfig(preset="gpt2_xl"), families=LLAMA_FAMILIES)
    assert "--preset llama_9m" in refusal(ModelConfig(preset="llama_9m"), families=GPT_FAMILIES)
    assert "gpt2" not in refusal(ModelConfig(preset="gpt3"), families=LLAMA_FAMILIES).replace("gpt3", "")


def test_an_odd_head_is_fine_without_rotary_positions() -> None:
    assert apply_preset(dataclasses.replace(SMALL, hidden_size=12), None, 9, GPT_FAMILIES).hidden_size == 12
    assert "--hidden-size" in refusal(dataclasses.replace(SMALL, hidden_size=12, ffn_hidden_size=9))
