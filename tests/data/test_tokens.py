"""Token files against Megatron's own reader, writer and split rule; damaged files; windows."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megalowrank.data.tokens import TokenFile, TokenWindow, split_documents, write_tokens
from megalowrank.errors import ConfigError


def make_documents(sizes, vocab_size, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, size) for size in sizes]


@pytest.fixture
def prefix(tmp_path):
    """A good pair of 5 documents, 100 tokens, for tests that damage it."""
    write_tokens(tmp_path / "good", make_documents([10, 20, 30, 25, 15], 500), 500)
    return str(tmp_path / "good")


@pytest.mark.parametrize("vocab_size, dtype", [(500, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_megatron_reads_what_we_write(tmp_path, vocab_size, dtype):
    documents = make_documents([7, 1, 300, 12], vocab_size)
    assert write_tokens(tmp_path / "sub" / "x", iter(documents), vocab_size) == (4, 320)
    dataset = IndexedDataset(str(tmp_path / "sub" / "x"))
    assert dataset.index.dtype is dtype
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    for number, document in enumerate(documents):
        assert np.array_equal(np.array(dataset[number]), document)
    assert sorted(os.listdir(tmp_path / "sub")) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_we_read_what_megatron_writes(tmp_path, dtype):
    documents = make_documents([7, 5, 30], 100)
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.from_numpy(documents[0]), [3, 4])
    builder.add_item(torch.from_numpy(documents[1]))
    builder.end_document()
    builder.add_document(torch.from_numpy(documents[2]), [10, 0, 20])
    builder.finalize(str(tmp_path / "x.idx"))
    token_file = TokenFile(tmp_path / "x")
    assert (token_file.n_documents, token_file.n_tokens, token_file.dtype) == (3, 42, dtype)
    assert [token_file.document_start(number) for number in range(4)] == [0, 7, 12, 42]
    assert np.array_equal(token_file.tokens, np.concatenate(documents))


def test_an_interrupted_or_refused_write_keeps_the_old_files(prefix):
    before = Path(f"{prefix}.bin").read_bytes()

    def broken():
        yield np.arange(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(prefix, broken(), 500)
    for documents in ([np.array([1, 500])], [np.array([-1])], []):
        with pytest.raises(ConfigError):
            write_tokens(prefix, documents, 500)
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert TokenFile(prefix).n_tokens == 100
    assert sorted(os.listdir(os.path.dirname(prefix))) == ["good.bin", "good.idx"]


def test_an_interruption_between_the_two_moves_leaves_no_index(prefix, monkeypatch):
    def replace_data_only(source, target):
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace_data_only)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(prefix, make_documents([100], 500, seed=1), 500)
    with pytest.raises(ConfigError, match="good.idx"):
        TokenFile(prefix)


def test_rewriting_replaces_both_files(prefix):
    write_tokens(prefix, [np.array([1, 2, 3])], 500)
    assert TokenFile(prefix).tokens.tolist() == [1, 2, 3]


def patch(offset, content):
    def damage(data):
        return data[:offset] + content + data[offset + len(content) :]

    return damage


LENGTHS = 34
POINTERS = LENGTHS + 5 * 4
BOUNDS = POINTERS + 5 * 8


@pytest.mark.parametrize(
    "ending, damage",
    [
        (".idx", None),
        (".bin", None),
        (".idx", lambda data: b""),
        (".idx", lambda data: data[:5]),
        (".idx", lambda data: data[:20]),
        (".idx", lambda data: data[:-1]),
        (".idx", lambda data: data + b"\0"),
        (".idx", lambda data: b"garbage" * 50),
        (".idx", patch(0, b"TNTIDX\0\0")),
        (".idx", patch(9, struct.pack("<Q", 2))),
        (".idx", patch(17, b"\x00")),
        (".idx", patch(17, b"\x06")),
        (".idx", patch(17, b"\x63")),
        (".idx", patch(18, struct.pack("<Q", 1 << 62))),
        (".idx", patch(26, struct.pack("<Q", 0))),
        (".idx", patch(LENGTHS, struct.pack("<i", 11))),
        (".idx", patch(LENGTHS, struct.pack("<i", -10))),
        (".idx", patch(POINTERS + 8, struct.pack("<q", 22))),
        (".idx", patch(BOUNDS, struct.pack("<q", 1))),
        (".idx", patch(BOUNDS + 8, struct.pack("<q", 4))),
        (".idx", patch(BOUNDS + 8 * 5, struct.pack("<q", 6))),
        (".bin", lambda data: b""),
        (".bin", lambda data: data[:-1]),
        (".bin", lambda data: data[:-2]),
        (".bin", lambda data: data + b"\0\0"),
    ],
)
def test_a_damaged_file_is_named(prefix, ending, damage):
    path = prefix + ending
    if damage is None:
        os.remove(path)
    else:
        Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(ConfigError, match="good") as caught:
        TokenFile(prefix)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_of_nothing_and_a_prefix_with_its_ending_are_refused(tmp_path, prefix):
    builder = IndexedDatasetBuilder(str(tmp_path / "empty.bin"), dtype=np.uint16)
    builder.finalize(str(tmp_path / "empty.idx"))
    with pytest.raises(ConfigError, match="empty.bin holds no tokens"):
        TokenFile(tmp_path / "empty")
    with pytest.raises(ConfigError, match="without the ending"):
        TokenFile(f"{prefix}.bin")
    os.mkdir(tmp_path / "folder.bin")
    with pytest.raises(ConfigError, match="folder.bin"):
        TokenFile(tmp_path / "folder")


def test_max_token(tmp_path):
    document = np.zeros(10_007, dtype=np.int64)
    for place in (0, 5_000, 10_006):
        document[:] = 1
        document[place] = 70_000
        write_tokens(tmp_path / "x", [document], 80_000)
        assert TokenFile(tmp_path / "x").max_token() == 70_000
    assert TokenFile(tmp_path / "x").max_token(100) == 70_000
    assert TokenFile(tmp_path / "x").max_token(1) in (1, 70_000)


def test_negative_tokens_are_refused(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(np.array([3, -1, 4]), [3])
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(ConfigError, match="negative"):
        TokenFile(tmp_path / "x").max_token()


@pytest.mark.parametrize("stop, expected", [(100, 12), (98, 12), (97, 12), (96, 11), (9, 1), (8, 0), (0, 0)])
def test_window_length_counts_whole_samples_with_a_target(prefix, stop, expected):
    assert len(TokenWindow(TokenFile(prefix), 0, stop, 8)) == expected


def test_windows_make_every_token_a_target_once(prefix):
    token_file = TokenFile(prefix)
    window = TokenWindow(token_file, 30, 91, 12)
    samples = [window.sample(index) for index in range(len(window))]
    flat = np.array(token_file.tokens[30:91], dtype=np.int64)
    assert len(samples) == 5 and all(sample.dtype == np.int64 and sample.shape == (13,) for sample in samples)
    assert np.array_equal(np.concatenate([sample[:-1] for sample in samples]), flat[:-1])
    assert np.array_equal(np.concatenate([sample[1:] for sample in samples]), flat[1:])


def test_samples_outlive_the_file_object(prefix):
    expected = TokenFile(prefix).tokens[:9].tolist()
    assert TokenWindow(TokenFile(prefix), 0, 100, 8).sample(0).tolist() == expected


def test_window_refuses_what_does_not_exist(prefix):
    token_file = TokenFile(prefix)
    window = TokenWindow(token_file, 0, 100, 8)
    for index in (-1, len(window)):
        with pytest.raises(IndexError):
            window.sample(index)
    for start, stop in ((0, 101), (-1, 50), (60, 50)):
        with pytest.raises(ValueError):
            TokenWindow(token_file, start, stop, 8)
    with pytest.raises(ConfigError, match="--seq-length"):
        TokenWindow(token_file, 0, 100, 0)


@pytest.mark.parametrize("n_documents", [40, 123, 1001])
@pytest.mark.parametrize("split", ["969,30,1", "95,5", "1", "90,0,10", "0.7,0.2,0.1", "1,1,1", " 98 , 1, 1", "0,0,1"])
def test_splits_agree_with_megatron(tmp_path, n_documents, split):
    sizes = np.random.default_rng(n_documents).integers(1, 9, n_documents)
    write_tokens(tmp_path / "x", make_documents(sizes, 50), 50)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    offsets = [0, *np.cumsum(sizes).tolist()]
    expected = []
    for edges in matrix:
        first, last = (int(round(edge * float(n_documents))) for edge in edges or (0, 0))
        expected.append((offsets[first], offsets[last]))
    token_file = TokenFile(tmp_path / "x")
    if any(edges and stop - start < 2 for edges, (start, stop) in zip(matrix, expected, strict=True)):
        with pytest.raises(ConfigError, match="--split"):
            split_documents(token_file, split)
        return
    found = split_documents(token_file, split)
    for edges, reference, (start, stop) in zip(matrix, expected, found, strict=True):
        assert (start, stop) == reference if edges else start == stop
    assert sum(stop - start for start, stop in found) == token_file.n_tokens


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "969/30/1", "1,,1", "nan,1", "1e3,1", "inf"])
def test_malformed_splits(prefix, split):
    with pytest.raises(ConfigError, match="--split"):
        split_documents(TokenFile(prefix), split)


def test_a_requested_split_without_a_sample_is_refused(prefix):
    token_file = TokenFile(prefix)
    assert split_documents(token_file, "80,20,0", 14) == [(0, 85), (85, 100), (100, 100)]
    with pytest.raises(ConfigError, match="validation"):
        split_documents(token_file, "80,20,0", 15)
    with pytest.raises(ConfigError, match="test split"):
        split_documents(token_file, "79,20,1")
