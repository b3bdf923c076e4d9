"""The commands of convert_hf, and what the programs make of what they write."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from megalowrank.checkpoint.hf.names import Stored
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import run_main
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, LENGTH, save_model
from tests.corpus import TinyCorpus
from tests.front_door_cases import BIN, finish, start, succeed, training
from tests.harness import run_program
from tools import convert_hf

PYTHON = str(BIN / "python")
TRAIN = (
    f"--ds-config ds_configs/zero0.json --seq-length {LENGTH} --micro-batch-size 4 --global-batch-size 4 --lr 3e-2 "
    "--log-interval 1 --eval-iters 2"
)
FIRST = (
    "--num-layers 1 --hidden-size 32 --ffn-hidden-size 40 --num-attention-heads 4 --num-query-groups 2 "
    "--tie-word-embeddings --method relora --lora-rank 4 --relora-interval 8 --train-iters 20"
)
SECOND = "--method switchlora --lora-rank 4 --train-iters 2 --lr 1e-30"


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of the tool."""
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, words)])
    try:
        run_main(convert_hf.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_out_and_back_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(CONFIGS["gpt2"], "switchlora", tmp_path / "run")
    assert run(monkeypatch, "to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "no tokenizer is written" in said and "logits differ from ours by at most" in said
    assert f"written to {tmp_path / 'hf'}" in said
    assert run(monkeypatch, "from-hf", tmp_path / "hf", tmp_path / "back") == 0
    assert "gpt2, 29 positions; logits differ from transformers' by at most" in capsys.readouterr().out
    assert run(monkeypatch, "to-hf", tmp_path / "run", tmp_path / "two", "--adapters") == 0
    words = ("from-hf", tmp_path / "two" / "base", tmp_path / "lora", "--adapters", tmp_path / "two" / "adapter")
    assert run(monkeypatch, *words) == 0
    assert SavedWeights.open(tmp_path / "lora").run["method"] == "lora"


def test_exit_codes_say_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for a mistake, 1 where logits differ; one line each, and nothing is left."""
    save_model(CONFIGS["neox"], "full", tmp_path / "run")
    assert run(monkeypatch, "to-hf", tmp_path / "nothing", tmp_path / "hf") == 2
    assert run(monkeypatch, "from-hf", tmp_path / "run", tmp_path / "hf") == 2
    right = Stored.join
    monkeypatch.setattr(Stored, "join", lambda stored, values: right(stored, values).roll(1, 0))
    assert run(monkeypatch, "to-hf", tmp_path / "run", tmp_path / "hf") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(errors) == 3 and errors[2].startswith("stopped: the converted model computes something else")
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_becomes_a_model_and_a_model_a_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported with its tokenizer, imported, trained on by another method, sampled; the first loss is the old one."""
    train = [PYTHON, "pretrain_llama.py", *TRAIN.split(), "--data-path", str(tiny_corpus.prefix), "--split", "80,20,0"]
    tokenizer = ["--tokenizer-model", str(tiny_corpus.tokenizer)]
    run_program([*train[1:], *tokenizer, *FIRST.split(), "--save", str(tmp_path / "run")])
    assert run(monkeypatch, "to-hf", tmp_path / "run", tmp_path / "hf") == 0
    assert "tokenizer.json" in os.listdir(tmp_path / "hf")
    assert "| held-out loss" in (tmp_path / "hf" / "README.md").read_text()
    assert run(monkeypatch, "from-hf", tmp_path / "hf", tmp_path / "back") == 0
    settings = json.loads((tmp_path / "back" / "model.json").read_text())
    assert settings["data"] == {"tokenizer_model": str(tmp_path / "back" / "tokenizer")}
    warm = ["--load", str(tmp_path / "back"), "--finetune", "--config", str(tmp_path / "back" / "model.json")]
    run_program([*train[1:], *warm, *SECOND.split(), "--save", str(tmp_path / "warm")])
    before, after = (json.loads(lines(tmp_path / name)[-1])["eval_loss"] for name in ("run", "warm"))
    assert after == pytest.approx(before, abs=1e-5)
    assert training(tmp_path / "warm")[0]["loss"] < training(tmp_path / "run")[0]["loss"] - 0.3
    sampled = succeed([PYTHON, "tools/generate.py", str(tmp_path / "back"), "--prompt", "the", "--max-new-tokens", "3"])
    assert sampled.startswith("the")
    code, _, err = finish(start([*train, *(word for word in warm if word != "--finetune"), "--method", "full"]))
    assert code == 2 and "checkpoint step_00000000" in err, "it has weights alone"


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()
