"""Hypothesis at the front door of data: whatever the bytes, a result or one line of ConfigError."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalowrank.data.manifest import load_manifest
from megalowrank.data.sources import JsonLines, PlainText
from megalowrank.data.tokenizers import load_tokenizer, tokenizer_vocab_size
from megalowrank.data.tokens import TokenFile, write_tokens
from megalowrank.data.wikitext import plain_text
from megalowrank.errors import ConfigError
from tests.corpus import TinyCorpus

SIZES = [5, 1, 7, 3]
many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
few = settings(many, max_examples=60)


def one_line(action: Callable[[], object]) -> None:
    """``action`` succeeds, or says what is wrong in one line of bearable length."""
    try:
        action()
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def good_pair(folder: str) -> tuple[Path, bytes]:
    write_tokens(f"{folder}/x", [np.arange(size) for size in SIZES], 500)
    path = Path(folder, "x.idx")
    return path, path.read_bytes()


def walk(prefix: str) -> None:
    """Open a pair and touch every token and document."""
    file = TokenFile(prefix)
    starts = [file.document_start(number) for number in range(file.n_documents + 1)]
    assert starts[-1] == file.n_tokens == len(file.tokens) and starts == sorted(starts)
    assert file.max_token() >= 0


changes = st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=9)), max_size=4)


@many
@given(changes, st.integers(0, 300))
def test_changed_and_cut_index_files(edits: list[tuple[int, bytes]], length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, content = good_pair(folder)
        for offset, piece in edits:
            content = content[:offset] + piece + content[offset + len(piece) :]
        path.write_bytes(content[: length if length < len(content) else None])
        one_line(lambda: walk(f"{folder}/x"))


@many
@given(
    st.integers(0, 9),
    st.lists(st.integers(-2, 9), max_size=5),
    st.lists(st.integers(-9, 40), max_size=5),
    st.lists(st.integers(-2, 6), max_size=5),
)
def test_index_files_of_any_content(code: int, lengths: list[int], pointers: list[int], bounds: list[int]) -> None:
    """A well-formed frame with any numbers inside."""
    with tempfile.TemporaryDirectory() as folder:
        pointers = (pointers + [0] * 5)[: len(lengths)]
        header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), len(bounds))
        body = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(bounds)}q", *lengths, *pointers, *bounds)
        Path(folder, "x.idx").write_bytes(header + body)
        Path(folder, "x.bin").write_bytes(bytes(2 * max(0, sum(lengths))))
        one_line(lambda: walk(f"{folder}/x"))


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", ""]), inner, max_size=3),
    max_leaves=5,
)
line = st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode())


@many
@given(st.lists(line, max_size=6), st.integers(1, 80))
def test_json_lines_of_any_bytes(lines: list[bytes], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_bytes(b"\n".join(lines))
        source = JsonLines(str(path))
        one_line(lambda: [text for part in source.parts(part_bytes) for text in source.read(part)])


texts = st.lists(st.text(max_size=40), max_size=12)


@many
@given(texts, st.integers(1, 200))
def test_json_lines_give_back_what_was_written(found: list[str], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        source = JsonLines(str(path))
        assert [text for part in source.parts(part_bytes) for text in source.read(part)] == found


@many
@given(st.text(alphabet="ab \t\n\rü", max_size=120), st.integers(1, 60), st.sampled_from(["line", "paragraph"]))
def test_parts_of_plain_text_do_not_change_its_documents(text: str, part_bytes: int, unit: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.txt")
        path.write_bytes(text.encode())
        source = PlainText(str(path), unit)
        cut = [found for part in source.parts(part_bytes) for found in source.read(part)]
        assert cut == [found for part in source.parts(1 << 20) for found in source.read(part)]
        assert "".join("".join(cut).split()) == "".join(text.split())


@few
@given(changes, st.integers(0, 400))
def test_changed_sentencepiece_files(tiny_corpus: TinyCorpus, edits: list[tuple[int, bytes]], length: int) -> None:
    content = tiny_corpus.tokenizer.read_bytes()
    for offset, piece in edits:
        content = content[: offset * 20] + piece + content[offset * 20 + len(piece) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.model")
        path.write_bytes(content[: length * 15 if length % 2 else None])
        one_line(lambda: load_tokenizer(path).encode("the quick fox") and None)


@few
@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_tokenizer_folders_of_any_content(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_bytes(content)
        one_line(lambda: tokenizer_vocab_size(folder))


@many
@given(st.binary(max_size=80) | anything.map(lambda value: json.dumps(value).encode()), st.integers(0, 400))
def test_manifests_of_any_content(tiny_corpus: TinyCorpus, content: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        good = Path(f"{tiny_corpus.prefix}.json").read_bytes()
        Path(folder, "x.json").write_bytes(content if cut % 2 else good[:cut] + content + good[cut + len(content) :])
        one_line(lambda: load_manifest(f"{folder}/x"))


@many
@given(
    st.lists(
        st.sampled_from(["[[", "]]", "{{", "}}", "{|", "|}", "|", "\n", "==", "a", "File:", "'''", "<b>", "&amp;"])
    )
)
def test_markup_of_any_nesting(pieces: list[str]) -> None:
    text = plain_text("".join(pieces))
    assert text.endswith("\n") and "[[" not in text and "{{" not in text
    assert text.count("a") <= pieces.count("a") + 2 * pieces.count("&amp;")


@pytest.mark.parametrize("depth", [50_000])
def test_deep_nesting_is_no_recursion(depth: int) -> None:
    assert plain_text("{{" * depth + "x" + "}}" * depth + "y") == "y\n"
    assert plain_text("[[" * depth + "x") == "x\n"
