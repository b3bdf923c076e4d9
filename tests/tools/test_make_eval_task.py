"""The task for lm-eval: what is asked, and that the file names it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from megalowrank.errors import ConfigError
from tools import make_eval_task


def make(folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["make_eval_task.py", "--input", str(folder / "text.jsonl"), "--out", str(folder / "out"), *more]
    monkeypatch.setattr(sys, "argv", words)
    make_eval_task.main()


def test_questions_are_lines_without_their_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    lines = {f"number {number} of the lines ends with": name for number, name in enumerate(names)}
    text = "\n".join(f"{start} {end}." for start, end in lines.items())
    make(tmp_path, [text, "too short", "this one does not end with a word 3"], monkeypatch, "--questions", "6")
    asked = [json.loads(line) for line in (tmp_path / "out" / "last_word.jsonl").read_text().splitlines()]
    assert {question["text"]: question["choices"][question["label"]] for question in asked} == lines
    assert all(len(set(question["choices"])) == 4 for question in asked)
    task = yaml.safe_load((tmp_path / "out" / "last_word.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "out" / "last_word.jsonl")
    assert task["doc_to_text"] in asked[0] and task["doc_to_choice"] in asked[0] and task["doc_to_target"] in asked[0]


def test_too_little_text_and_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="too few lines"):
        make(tmp_path, ["one two three four five six seven"], monkeypatch)
    with pytest.raises(ConfigError, match="--input is not JSON lines with text"):
        list(make_eval_task.read_texts(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()
