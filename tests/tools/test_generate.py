"""Sampling against transformers' greedy search and against probabilities counted by hand."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.models.architecture import LLAMA_FAMILIES, completed
from megalowrank.models.build import build_llama
from megalowrank.parallel.groups import initialize_single_process
from tests.models.hugging_face import hugging_face
from tools.generate import check, choose, continue_text, device_of

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, vocab_size=60,
    init_method_std=0.3,
)  # fmt: skip
ARGS = argparse.Namespace(max_new_tokens=12, temperature=0.0, top_k=0, top_p=1.0, num_samples=1, seed=0)


class Letters:
    """A tokenizer of one letter a token; 59 ends a document."""

    def vocab_size(self) -> int:
        return 60

    def eos_id(self) -> int:
        return 59

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 48) for i in ids)


@pytest.fixture(autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def test_greedy_is_that_of_transformers() -> None:
    model = build_llama(CONFIG, FullRank(FullRankConfig()), length=32, seed=5)
    reference = hugging_face(completed(CONFIG, LLAMA_FAMILIES), model, torch.float32)
    prompt = "0A1Z"
    ids = torch.tensor([Letters().encode(prompt)])
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 59, "pad_token_id": 0}
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False, **options)[0].tolist()
    expected = expected[: expected.index(59)] if 59 in expected else expected
    assert continue_text(model, Letters(), prompt, 32, ARGS, torch.Generator()) == Letters().decode(expected)
    assert len(expected) > 6


def test_only_the_window_is_seen() -> None:
    model = build_llama(CONFIG, FullRank(FullRankConfig()), length=4, seed=5)
    texts = [continue_text(model, Letters(), prompt, 4, ARGS, torch.Generator()) for prompt in ("000A1ZB", "999A1ZB")]
    assert texts[0][7:] == texts[1][7:] and texts[0] != texts[1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [(1.0, 0, 1.0, [0.5, 0.3, 0.15, 0.05]), (1.0, 2, 1.0, [0.625, 0.375, 0, 0]),
     (1.0, 0, 0.5, [1, 0, 0, 0]), (1.0, 0, 0.79, [0.625, 0.375, 0, 0]), (0.5, 2, 1.0, [0.735, 0.265, 0, 0])],
)  # fmt: skip
def test_draws_have_the_right_frequencies(temperature: float, top_k: int, top_p: float, expected: list[float]) -> None:
    source, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for _ in range(4000):
        counts[choose(logits, temperature, top_k, top_p, source)] += 1
    assert (counts / 4000)[[1, 3, 0, 2]].tolist() == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("max_new_tokens", 0), ("num_samples", 0), ("seed", -1),
     ("seed", 2**63)],
)  # fmt: skip
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is out of range"):
        check(argparse.Namespace(**{**vars(ARGS), name: value}))


def test_a_device_that_is_not_there() -> None:
    assert device_of("cpu").type == "cpu"
    for name in ("gpu", "", "cpu:x", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ConfigError, match="--device cannot be used"):
            device_of(name)
