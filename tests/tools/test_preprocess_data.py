"""The preprocessing program: every kind of input, and every mistake in one line with nothing left behind."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megalowrank.data.manifest import load_manifest
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError
from tests.corpus import TinyCorpus, documents
from tests.data.hf_tokenizers import make_byte_level
from tests.harness import ROOT

SCRIPT = ROOT / "tools" / "preprocess_data.py"
TEXTS = documents(12, 10)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The same documents in every format, as flags."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("inputs")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "x.jsonl").write_text(lines)
    (folder / "x.json.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), folder / "x.parquet", row_group_size=5)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    (folder / "files").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "files" / f"{number:02d}.txt").write_text(text)
    (folder / "stream").mkdir()
    (folder / "stream" / "train.jsonl").write_text(lines)
    return {
        "jsonl": ["--input", str(folder / "x.jsonl")],
        "gz": ["--input", str(folder / "x.json.gz")],
        "parquet": ["--input", str(folder / "x.parquet"), "--json-keys", "body"],
        "saved": ["--input", str(folder / "saved")],
        "files": ["--input", str(folder / "files")],
        "stream": ["--dataset", str(folder / "stream")],
    }


@pytest.mark.parametrize("kind", ["gz", "parquet", "saved", "files", "stream"])
def test_every_kind_of_input_gives_the_same_tokens(
    tool: ModuleType, inputs: dict[str, list[str]], kind: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    for name in ("jsonl", kind):
        flags = ["--output-prefix", str(tmp_path / name), "--tokenizer-model", str(tiny_corpus.tokenizer)]
        tool.main([*inputs[name], *flags, "--workers", "1"])
    for ending in (".bin", ".idx", ".sizes"):
        assert (tmp_path / f"jsonl{ending}").read_bytes() == (tmp_path / f"{kind}{ending}").read_bytes()


def test_a_tokenizer_trained_on_the_spot(
    tool: ModuleType, inputs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs["jsonl"], "--output-prefix", str(tmp_path / "x"), "--vocab-size", "300", "--workers", "1"]
    tool.main(flags)
    model = (tmp_path / "x.model").read_bytes()
    out = capsys.readouterr()
    assert f"--tokenizer-model {tmp_path / 'x'}.model" in out.out and "MB/s" in out.err
    assert (load_manifest(tmp_path / "x") or {})["vocab_size"] == 300
    tool.main(flags)
    assert "is there already" in capsys.readouterr().out and (tmp_path / "x.model").read_bytes() == model


def test_by_a_hugging_face_folder(tool: ModuleType, inputs: dict[str, list[str]], tmp_path: Path) -> None:
    bare = make_byte_level(tmp_path / "hf", TEXTS, 400)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "hf"), "--workers", "2"]
    tool.main([*inputs["jsonl"], *flags, "--output-prefix", str(tmp_path / "x"), "--part-mb", "0.002"])
    expected = sum(([*bare.encode(text).ids, 0] for text in TEXTS), [])
    assert TokenFile(tmp_path / "x").tokens.tolist() == expected


def mistakes(folder: Path, tokenizer: str, good: list[str]) -> list[tuple[list[str], str]]:
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (folder / "array.json").write_text('[{"text": "a"}]')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "x.csv").write_text("a")
    (folder / "text.txt").write_text("a")
    (folder / "empty.jsonl").write_text("")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (folder / "not.parquet").write_text("x" * 100)
    model = ["--tokenizer-model", tokenizer]
    out = ["--output-prefix", str(folder / "out" / "x")]
    bad = [
        (["--input", str(folder / name), *model, *out], name)
        for name in ("bad.jsonl", "array.json", "latin.txt", "x.csv", "cut.jsonl.gz", "not.parquet", "absent.jsonl")
    ]
    return bad + [
        (["--input", str(folder / "empty.jsonl"), *model, *out], "no tokens"),
        ([*good, *out], "one of --tokenizer-model and --vocab-size"),
        ([*good, *model, *out, "--vocab-size", "300"], "one of --tokenizer-model and --vocab-size"),
        ([*good, *out, "--vocab-size", "10"], "--vocab-size is out of range"),
        ([*good, *out, "--vocab-size", "many"], "--vocab-size"),
        ([*good, *model], "--output-prefix is missing"),
        ([*model, *out], "one of --input and --dataset"),
        ([*good, "--dataset", "a/b", *model, *out], "one of --input and --dataset"),
        ([*good, *model, *out, "--json-keys", "a", "b"], "--json-keys takes one key"),
        ([*good, *model, *out, "--json-keys", "body"], "has no body"),
        ([*good, *out, "--tokenizer-model", str(folder / "bad.jsonl")], "not a tokenizer"),
        ([*good, *out, "--tokenizer-model", str(folder)], "no Hugging Face tokenizer"),
        ([*good, *model, *out, "--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type is not supported"),
        ([*good, *model, *out, "--workers", "0"], "--workers"),
        ([*good, *model, *out, "--part-mb", "nan"], "--part-mb"),
        ([*good, *model, *out, "--part-mb", "1e-9"], "--part-mb"),
        ([*good, *model, *out, "--log-interval", "0"], "--log-interval"),
        ([*good, *model, *out, "--split-sentences"], "--split-sentences"),
        ([*good, *model, *out, "--sample-by", "word"], "--sample-by"),
        ([*good, *model, "--output-prefix", str(folder / "x.csv" / "x")], "x.csv"),
        ([*good, *model, "--output-prefix", str(folder / "out") + "/"], "--output-prefix ends with a folder"),
        ([*good, *model, *out, "--dataset-config", "en"], "--dataset-config has no effect"),
        ([*good, *model, *out, "--dataset-revision", "main"], "--dataset-revision has no effect"),
        ([*good, *model, *out, "--dataset-split", "dev"], "--dataset-split has no effect"),
        ([*good, *model, *out, "--sample-by", "line"], "--sample-by has no effect"),
        (["--input", str(folder / "text.txt"), *model, *out, "--json-keys", "a"], "--json-keys has no effect"),
        ([*good, *model, *out, "--tokenizer-sample-mb", "1"], "--tokenizer-sample-mb has no effect"),
        (["--dataset", str(folder / "out"), "--dataset-split", "dev", *model, *out], "out"),
    ]


def test_mistakes_are_one_line_and_leave_no_result(
    tool: ModuleType, inputs: dict[str, list[str]], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    for flags, named in mistakes(tmp_path, str(tiny_corpus.tokenizer), inputs["jsonl"]):
        with pytest.raises(ConfigError) as caught:
            tool.main(flags)
        assert named in str(caught.value) and "\n" not in str(caught.value), flags
        left = {path.name for path in (tmp_path / "out").glob("*")} if (tmp_path / "out").exists() else set()
        assert left <= {"x.parts"}, (flags, left)


def test_no_input_is_overwritten(tool: ModuleType, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    text = tmp_path / "x.json"
    text.write_text('{"text": "a"}\n')
    flags = ["--tokenizer-model", str(tiny_corpus.tokenizer), "--output-prefix", str(tmp_path / "x"), "--overwrite"]
    with pytest.raises(ConfigError, match="would overwrite the input"):
        tool.main(["--input", str(text), *flags])
    assert text.read_text() == '{"text": "a"}\n' and list(tmp_path.iterdir()) == [text]


def test_a_tokenizer_that_is_there_is_replaced_only_if_wanted(
    tool: ModuleType, inputs: dict[str, list[str]], tmp_path: Path
) -> None:
    flags = [*inputs["jsonl"], "--output-prefix", str(tmp_path / "x"), "--workers", "1", "--vocab-size"]
    tool.main([*flags, "300"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="x.model is there, made from something else.*--overwrite"):
        tool.main([*flags, "310"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    tool.main([*flags, "310", "--overwrite"])
    assert (load_manifest(tmp_path / "x") or {})["vocab_size"] == 310 and before.keys() == set(
        path.name for path in tmp_path.iterdir()
    )


def test_the_program_prints_one_line_and_leaves_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--input", "absent.jsonl", "--vocab-size", "300", "--output-prefix", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: no such --input; got absent.jsonl") and done.stderr.count("\n") == 1
