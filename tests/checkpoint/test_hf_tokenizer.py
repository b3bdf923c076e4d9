"""Tokenizers of exported models: AutoTokenizer gives the ids of the tokenizer that the run was trained with."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megalowrank.checkpoint.hf import tokenizer as module
from megalowrank.checkpoint.hf.tokenizer import write_tokenizer
from megalowrank.data.tokenizers import train_tokenizer
from megalowrank.errors import ConfigError
from tests.corpus import documents
from tests.data.hf_tokenizers import make_byte_level


def foreign_texts() -> list[str]:
    """Text of the corpus, spaces and lines of every kind, letters that no piece has."""
    source = random.Random(4)
    alphabet = "the quick fox  \n\t\r äßé北🙂\u2581<>/s0"
    drawn = ["".join(source.choices(alphabet, k=source.randint(0, 30))) for _ in range(200)]
    return [*documents(2), *drawn, "", " ", "   ", "\n\n"]


def train(path: Path, **options: Any) -> None:
    """A sentencepiece model with the library's own defaults, where ``options`` say nothing else."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(documents(8)).split("\n")), model_writer=model, minloglevel=2,
        vocab_size=options.pop("vocab_size", 320), num_threads=1, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


MODELS: dict[str, dict[str, Any] | None] = {
    "ours": None,
    "bpe with defaults": {"model_type": "bpe", "byte_fallback": True},
    "bpe without bytes": {"model_type": "bpe", "vocab_size": 90},
    "bpe with symbols": {
        "model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<mask>", "fox"],
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 300},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    path, options = tmp_path / "a.model", MODELS[name]
    if options is None:
        train_tokenizer(documents(8), path, 320)
    else:
        train(path, **options)
    (tmp_path / "hf").mkdir()
    given, ids = write_tokenizer(path, tmp_path / "hf", 64)
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert len(found) == given.vocab_size() and found.model_max_length == 64
    for text in foreign_texts():
        expected = given.encode(text)
        assert found.encode(text, add_special_tokens=False) == expected == found.encode(text), repr(text)
        assert given.unk_id() in expected or found.decode(expected) == given.decode(expected), repr(text)


def test_a_hugging_face_folder_is_copied(tmp_path: Path) -> None:
    make_byte_level(tmp_path / "a", documents(4), 300)
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "weights.bin").write_bytes(b"x")
    (tmp_path / "hf").mkdir()
    given, ids = write_tokenizer(tmp_path / "a", tmp_path / "hf", 64)
    copied = {path.name for path in (tmp_path / "hf").iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / "hf" / name).read_bytes() == (tmp_path / "a" / name).read_bytes() for name in copied)
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert all(found.encode(text) == given.encode(text) for text in foreign_texts())
    assert ids["eos_token_id"] == given.eos_id()


def test_other_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(documents(8), tmp_path / "a.model", 320)
    (tmp_path / "hf").mkdir()
    monkeypatch.setattr(module, "_merges", lambda model, vocabulary: [])
    with pytest.raises(ConfigError, match="has no equal in transformers; got other ids for"):
        write_tokenizer(tmp_path / "a.model", tmp_path / "hf", 64)


def test_a_type_without_an_equal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    train(tmp_path / "a.model", model_type="char", vocab_size=40)
    with pytest.raises(ConfigError, match="no exact equal in transformers; got type 4"):
        write_tokenizer(tmp_path / "a.model", tmp_path / "hf", 64)
    train(tmp_path / "b.model", model_type="bpe", byte_fallback=True, user_defined_symbols=["fox"])
    with pytest.raises(ConfigError, match="symbols of its own and changes spaces"):
        write_tokenizer(tmp_path / "b.model", tmp_path / "hf", 64)
