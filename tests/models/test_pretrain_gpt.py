"""The program for GPT models as a user starts it: trained and resumed under ZeRO-3, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalowrank.engine.setup import pretrain
from megalowrank.errors import ConfigError
from megalowrank.models.architecture import GPT_FAMILIES
from megalowrank.models.build import build_gpt
from tests.corpus import TinyCorpus
from tests.front_door_cases import ITERS, METHOD, TRAIN, training
from tests.harness import run_program

PROGRAM = "pretrain_gpt.py"
SHAPE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4"


def flags_of(corpus: TinyCorpus, family: str, *more: str) -> list[str]:
    words = f"--ds-config ds_configs/zero3.json --bf16 {SHAPE} {METHOD} {TRAIN}"
    chosen = ["--model-family", family] if family != GPT_FAMILIES[0] else []
    return [*words.split(), *chosen, *corpus.flags(), *more]


def run(corpus: TinyCorpus, family: str, folder: Path, *more: str) -> dict[str, Any]:
    """Train on two ranks; returns the model section of run.json."""
    run_program([PROGRAM, *flags_of(corpus, family, "--save", str(folder), *more)], 2)
    return json.loads((folder / "run.json").read_text())["model"]


@pytest.mark.parametrize("family", GPT_FAMILIES[:1])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(family: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    model = run(tiny_corpus, family, whole, "--save-interval", "4")
    run(tiny_corpus, family, rest, "--load", str(whole / "step_00000004"))
    losses = [line["loss"] for line in training(whole)]
    assert [line["loss"] for line in training(rest)] == losses[4:] and len(losses) == ITERS
    assert losses[-1] < 0.9 * losses[0]
    assert (model["model_family"], model["ffn_hidden_size"], model["norm_epsilon"]) == (family, 128, 1e-5)
    learned = family == "gpt2"
    assert model["max_position_embeddings"] == (32 if learned else None)
    assert model["rotary_percent"] == (None if learned else 0.25)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model-family", "llama"], "--model-family llama gpt2 neox"),
        (["--preset", "llama_9m"], "--preset llama_9m"),
        (["--num-query-groups", "2"], "--num-query-groups gpt2"),
        (["--max-position-embeddings", "31"], "--max-position-embeddings --seq-length 31 32"),
        (["--norm-impl", "fused"], "--norm-impl fused torch apex"),
    ],
)
def test_refusals(flags: list[str], parts: str, tiny_corpus: TinyCorpus) -> None:
    with pytest.raises(ConfigError) as caught:
        pretrain(flags_of(tiny_corpus, "gpt2", *flags), build_gpt, PROGRAM, GPT_FAMILIES)
    assert all(part in str(caught.value) for part in parts.split()), caught.value
