"""The data of a run: single sets, blends, separate sets for training and evaluation, tokenizers that do not fit."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalowrank.config import DataConfig, TrainConfig
from megalowrank.data.manifest import bytes_per_token, load_manifest
from megalowrank.data.prepare import prepare
from megalowrank.data.tokenizers import load_tokenizer, train_tokenizer
from megalowrank.data.tokens import TokenFile, split_documents
from megalowrank.engine.corpus import open_corpus, tokenizer_size
from megalowrank.errors import ConfigError
from tests.corpus import TinyCorpus, documents, make_corpus
from tests.data.hf_tokenizers import make_byte_level

TRAIN = TrainConfig(seq_length=16)


@pytest.fixture(scope="module")
def second(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other text by the same tokenizer."""
    prefix = tmp_path_factory.mktemp("second") / "second"
    prepare([text.upper() for text in documents(20, 10)], prefix, tiny_corpus.tokenizer, {})
    return str(prefix)


def config(*words: str, **fields: object) -> DataConfig:
    return DataConfig(**{"data_path": list(words) or None, "split": "80,20,0", **fields})  # type: ignore[arg-type]


def test_a_blend_draws_from_every_training_split(tiny_corpus: TinyCorpus, second: str) -> None:
    corpus = open_corpus(config("3", str(tiny_corpus.prefix), "1", second), TRAIN, 320, 8)
    files = [TokenFile(tiny_corpus.prefix), TokenFile(second)]
    allowed: list[set[bytes]] = []
    for file in files:
        start, stop = split_documents(file, "80,20,0")[0]
        starts = range(start, stop - 16, 16)
        allowed.append({np.array(file.tokens[i : i + 17], dtype=np.int64).tobytes() for i in starts})
    assert not allowed[0] & allowed[1]
    rows = corpus.train.rows(np.arange(2000))
    counts = Counter(next(k for k in (0, 1) if row.tobytes() in allowed[k]) for row in rows)
    assert counts[0] == 1500 and counts[1] == 500
    assert np.array_equal(corpus.train.micro_batch(3, 0, 8, 0, 1).numpy(), rows[24:32])


def test_the_order_of_every_part_depends_on_the_seed(tiny_corpus: TinyCorpus, second: str) -> None:
    words = ("3", str(tiny_corpus.prefix), "1", second)
    streams = [
        open_corpus(config(*words), replace(TRAIN, seed=seed), 320, 8).train.rows(np.arange(400)) for seed in (5, 5, 6)
    ]
    assert np.array_equal(streams[0], streams[1])
    same = (streams[0] == streams[2]).all(1)
    assert same.sum() < 20, "of either part hardly a sample stays in its place"


def test_figures_of_a_blend_are_those_of_its_mixture(tiny_corpus: TinyCorpus, second: str) -> None:
    prefixes, shares = [str(tiny_corpus.prefix), second], [0.75, 0.25]
    corpus = open_corpus(config("3", prefixes[0], "1", prefixes[1]), TRAIN, 320, 8)
    files = [TokenFile(prefix) for prefix in prefixes]
    ranges = [split_documents(file, "80,20,0") for file in files]
    each = [bytes_per_token(load_manifest(f.prefix) or {}, f, r[1]) for f, r in zip(files, ranges, strict=True)]
    assert corpus.bytes_per_token == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    chance = np.zeros(320)
    for share, file, (train, _, _) in zip(shares, files, ranges, strict=True):
        counts = Counter(file.tokens[slice(*train)].tolist())
        total = train[1] - train[0] + 320
        chance += share * np.array([(counts[token] + 1) / total for token in range(320)])
    expected = 0.0
    for share, file, (_, valid, _) in zip(shares, files, ranges, strict=True):
        tokens = file.tokens[slice(*valid)].tolist()
        expected -= share * sum(math.log(chance[token]) for token in tokens) / len(tokens)
    assert corpus.unigram_loss == pytest.approx(expected, rel=1e-9)


def test_a_blend_of_one_is_the_set_itself(tiny_corpus: TinyCorpus) -> None:
    alone, blend = (open_corpus(config(*w, str(tiny_corpus.prefix)), TRAIN, 320, 8) for w in ([], ["0.5"]))
    assert np.array_equal(alone.train.rows(np.arange(100)), blend.train.rows(np.arange(100)))
    assert alone.bytes_per_token == blend.bytes_per_token and alone.unigram_loss == blend.unigram_loss


def test_separate_sets_for_training_and_evaluation(tiny_corpus: TinyCorpus, second: str) -> None:
    both = {"train_data_path": [second], "valid_data_path": [str(tiny_corpus.prefix)]}
    corpus = open_corpus(config(**both), TRAIN, 320, 8)
    assert corpus.valid is not None and corpus.bytes_per_token is not None
    assert corpus.valid.rows(np.array([0]))[0].tolist() == TokenFile(tiny_corpus.prefix).tokens[:17].tolist()
    manifest = load_manifest(tiny_corpus.prefix) or {}
    assert corpus.bytes_per_token == pytest.approx(manifest["bytes"] / manifest["tokens"])
    assert open_corpus(config(train_data_path=[second]), TRAIN, 320, 8).valid is None
    for fields in ({"data_path": [second], **both}, {"valid_data_path": [second]}):
        with pytest.raises(ConfigError, match="data-path"):
            DataConfig(**fields).check()  # type: ignore[arg-type]


def test_data_without_manifest_have_no_bytes(tiny_corpus: TinyCorpus, second: str, tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(second + ending, tmp_path / f"x{ending}")
    corpus = open_corpus(config("1", str(tiny_corpus.prefix), "1", str(tmp_path / "x")), TRAIN, 320, 8)
    assert corpus.bytes_per_token is None and corpus.unigram_loss is not None


def test_tokenizers_that_do_not_fit(tiny_corpus: TinyCorpus, second: str, tmp_path: Path) -> None:
    other = make_corpus(tmp_path)
    train_tokenizer([text.upper() for text in documents(10)], tmp_path / "upper.model", 300)
    prepare(documents(20), tmp_path / "upper", tmp_path / "upper.model", {})
    assert open_corpus(config("1", str(other.prefix), "1", second), TRAIN, 320, 8)
    with pytest.raises(ConfigError, match="made by different tokenizers"):
        open_corpus(config("1", second, "1", str(tmp_path / "upper")), TRAIN, 320, 8)
    with pytest.raises(ConfigError, match="--tokenizer-model .* is not the one"):
        open_corpus(config(second, tokenizer_model=str(tmp_path / "upper.model")), TRAIN, 320, 8)


def test_hugging_face_tokenizers(tmp_path: Path) -> None:
    make_byte_level(tmp_path / "hf", documents(10), 400)
    prepare(documents(10), tmp_path / "x", tmp_path / "hf", {})
    found = config(str(tmp_path / "x"), tokenizer_model=str(tmp_path / "hf"))
    size = load_tokenizer(tmp_path / "hf").vocab_size()
    assert tokenizer_size(found) == tokenizer_size(config(str(tmp_path / "x"))) == size
    assert open_corpus(found, TRAIN, size, 8).bytes_per_token
    largest = int(TokenFile(tmp_path / "x").tokens.max())
    with pytest.raises(ConfigError, match="does not fit --vocab-size"):
        open_corpus(found, TRAIN, largest, 8)


def test_a_damaged_table_of_sizes_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    for ending in (".bin", ".idx", ".json", ".sizes"):
        shutil.copy(f"{tiny_corpus.prefix}{ending}", tmp_path / f"x{ending}")
    sizes = tmp_path / "x.sizes"
    content = sizes.read_bytes()
    for damaged in (content[:-8], content[:9] + b"\x01" + content[10:], None):
        sizes.unlink() if damaged is None else sizes.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"x\.sizes"):
            open_corpus(config(str(tmp_path / "x")), TRAIN, 320, 8)
