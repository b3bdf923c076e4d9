"""The comparison of methods: what the script starts, in which order and how often, and the table and picture."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from megalowrank.errors import run_main
from tests.harness import ROOT

# notes what it is asked for; exports make their folder, and the list of models has two
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
*convert_hf.py*) [ -z "${FAIL:-}" ] || exit 2; mkdir -p "$4" ;;
*" models "*) printf 'full %s/full\\nlora %s/lora\\n' "$OUT" "$OUT" ;;
esac
"""
PRETRAINED = {
    "full": {"lr": "1e-3", "bits_per_byte": 2.5, "folder": "runs/full_lr1e-3_seed0"},
    "lora": {"lr": "2e-2", "bits_per_byte": 2.75, "folder": "runs/lora_lr2e-2_seed0"},
}


def record(model: str, measure: str, mean: float, stdev: float | None) -> dict[str, Any]:
    last = {"mean": mean, "stdev": stdev}
    return {"model": model, "task": "reviews", "measure": measure, "seeds": [1, 2], "last": last, "best": last}


RECORDS = [
    record("full", "accuracy", 0.75, 0.0125), record("full", "loss", 0.5, 0.1), record("lora", "accuracy", 0.625, None),
    record("full", "f1", 0.5, 0.25),
]  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("compare_methods")
    sys.path.remove(str(ROOT / "tools"))


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of the program."""
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *map(str, words)])
    try:
        run_main(tool.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def script(folder: Path, **more: str) -> tuple[int, list[str]]:
    """Its exit code and what it started."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    log = folder / "log"
    log.write_text("")
    names = {"OUT": "out", "DATA": "data", "REVIEWS": "reviews", "VENV": "venv"}
    env = {**os.environ, **{name: str(folder / path) for name, path in names.items()}, "LOG": str(log), **more}
    done = subprocess.run([ROOT / "tools" / "compare_methods.sh"], env=env, capture_output=True, text=True, check=False)
    return done.returncode, log.read_text().replace(str(folder), "").splitlines()


def test_the_script_goes_on_where_it_stopped(tmp_path: Path) -> None:
    code, lines = script(tmp_path, METHODS="full lora", SEEDS="4 5", FAIL="1")
    assert code == 2 and len(lines) == 5, "it stops at the first step that fails"
    code, lines = script(tmp_path, METHODS="full lora", SEEDS="4 5")
    assert code == 0 and [line.split()[0] for line in lines] == [
        "tools/prepare_enwik8.py", "tools/prepare_reviews.py", "benchmarks/enwik8.py", "tools/compare_methods.py",
        "tools/convert_hf.py", "tools/convert_hf.py", "tools/finetune_glue.py", "tools/compare_methods.py",
    ]  # fmt: skip
    assert "--methods full lora --seeds 0" in lines[2] and lines[2].endswith("--save")
    assert lines[4] == "tools/convert_hf.py to-hf /out/full/checkpoints /out/hf/full"
    assert lines[6].startswith(
        "tools/finetune_glue.py full=/out/hf/full lora=/out/hf/lora --tasks /reviews --seeds 4 5 "
    )
    assert lines[7] == "tools/compare_methods.py table /out/pretrain /out/glue --out /out"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "enwik8.bin").touch()
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.jsonl").touch()
    code, again = script(tmp_path, METHODS="full lora", SEEDS="4 5")
    assert code == 0 and again == [line for line in lines if "prepare" not in line and "convert" not in line]


def test_table_and_picture(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("pretrain", PRETRAINED), ("glue", {"results": RECORDS})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    assert run(tool, monkeypatch, "models", tmp_path / "pretrain") == 0
    assert capsys.readouterr().out == "full runs/full_lr1e-3_seed0\nlora runs/lora_lr2e-2_seed0\n"
    assert run(tool, monkeypatch, "table", tmp_path / "pretrain", tmp_path / "glue", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "methods.md").read_text().splitlines() == [
        "| method | lr | held-out bits per byte | reviews accuracy | reviews f1 |",
        "| --- | --- | --- | --- | --- |",
        "| full | 1e-3 | 2.500 | 0.7500 ± 0.0125 | 0.5000 ± 0.2500 |",
        "| lora | 2e-2 | 2.750 | 0.6250 | - |",
    ]
    with Image.open(tmp_path / "out" / "methods.png") as picture:
        assert picture.width > 500
    assert run(tool, monkeypatch, "models", tmp_path) == 2
    assert "has no usable results.json" in capsys.readouterr().err
