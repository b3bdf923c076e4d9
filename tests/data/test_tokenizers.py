"""Tokenizers against the libraries they come from; fingerprints; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megalowrank.data.prepare import prepare
from megalowrank.data.tokenizers import (
    encode_documents,
    load_tokenizer,
    tokenizer_sha256,
    tokenizer_vocab_size,
)
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError
from tests.corpus import TinyCorpus, documents
from tests.data.hf_tokenizers import END, make_byte_level

TEXTS = ["the quick fox", " two  blanks ", "ünï 東京 🙂", "line\n\nline\t", "the lazy dog " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tokenizer"
    make_byte_level(path, documents(10), 400)
    return path


def test_hugging_face_ids_are_those_of_the_bare_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = make_byte_level(tmp_path / "same", documents(10), 400)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size() == tokenizer_vocab_size(folder) == bare.get_vocab_size()
    assert tokenizer.eos_id() == bare.token_to_id(END)
    for text in TEXTS:
        assert tokenizer.encode(text) == bare.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    lengths, ids = encode_documents(tokenizer, TEXTS, tokenizer.eos_id())
    rows = [[*bare.encode(text, add_special_tokens=False).ids, bare.token_to_id(END)] for text in TEXTS]
    assert ids.tolist() == sum(rows, []) and lengths.tolist() == [len(row) for row in rows]


def test_sentencepiece_ids_are_those_of_the_library(tiny_corpus: TinyCorpus) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_corpus.tokenizer))
    lengths, ids = encode_documents(load_tokenizer(tiny_corpus.tokenizer), TEXTS, None)
    assert ids.tolist() == sum((reference.encode(text) for text in TEXTS), [])
    assert ids.dtype == np.int64 and lengths.tolist() == [len(reference.encode(text)) for text in TEXTS]
    assert encode_documents(load_tokenizer(tiny_corpus.tokenizer), [], 1)[1].size == 0


def test_data_by_a_hugging_face_tokenizer(folder: Path, tmp_path: Path) -> None:
    manifest = prepare(TEXTS, tmp_path / "x", folder, {})
    tokenizer = load_tokenizer(folder)
    assert TokenFile(tmp_path / "x").tokens.tolist() == [i for t in TEXTS for i in [*tokenizer.encode(t), 0]]
    assert manifest["tokenizer_sha256"] == tokenizer_sha256(folder, tokenizer)


def test_a_sentencepiece_file_in_a_llama_folder(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    shutil.copy(tiny_corpus.tokenizer, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size(), tokenizer.eos_id()) == (320, 2)
    assert tokenizer.encode("the fox") and 1 not in tokenizer.encode("the fox")


def test_fingerprints_follow_content_not_place(folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer_sha256(copy, tokenizer) == tokenizer_sha256(folder, tokenizer)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert tokenizer_sha256(copy, tokenizer) != tokenizer_sha256(folder, tokenizer)


def test_what_is_no_tokenizer(folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {}}')
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "code.py").write_text("raise SystemExit('ran')")
    (remote / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", null]}}')
    for path, kind in (
        (tmp_path / "absent", None), (tmp_path / "empty", None), (tmp_path / "broken", None), (remote, None),
        (folder, "SentencePieceTokenizer"), (tiny_corpus.tokenizer, "HuggingFaceTokenizer"),
        (tmp_path / "absent", "SentencePieceTokenizer"), (tiny_corpus.tokenizer, "GPT2BPETokenizer"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(path, kind)
        assert "\n" not in str(caught.value), path


def test_a_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    make_byte_level(tmp_path / "t", documents(5), 300, end=None)
    assert load_tokenizer(tmp_path / "t").eos_id() == -1
    with pytest.raises(ConfigError, match="no end-of-text"):
        prepare(TEXTS, tmp_path / "x", tmp_path / "t", {})
