"""Merged checkpoints: the same function as one of full-rank training, whatever tool reads it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megalowrank.checkpoint.plain import load_plain
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import ConfigError, TrainingError
from megalowrank.models.projections import SHORTCUTS
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, METHODS, STEP, save_model, tokens
from tests.models.hugging_face import hugging_face
from tools import merge


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, words)])
    merge.main()


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_it_computes_what_was_trained(
    method: str, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(CONFIGS["neox, tied"], method, tmp_path / "run", low)
    run(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert capsys.readouterr().out == f"{method}, update {STEP}, merged: written to {tmp_path / 'out'}\n"
    saved = SavedWeights.open(tmp_path / "out")
    assert saved.run["method"] == saved.run["train"]["method"] == "full" and saved.adapters is None
    assert saved.checkpoint.names() == sorted(f"master/{name}" for name in saved.names)
    expected = hugging_face(CONFIGS["neox, tied"], model, torch.float32)(tokens()).logits
    assert (load_plain(saved).module.logits(tokens()).transpose(0, 1) - expected).abs().max() < 1e-4
    origin = saved.checkpoint.state["origin"]
    assert origin["method"] == method and origin["updates"] == STEP and origin["tokens"] == STEP * 4 * 21
    run(monkeypatch, tmp_path / "out", tmp_path / "again")
    files = [sorted((tmp_path / name / f"step_{STEP:08d}").iterdir()) for name in ("out", "again")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@torch.no_grad()
def test_what_is_off_is_left_out_and_shortcuts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = ["layers.0.attention.q", "layers.1.mlp.down"]
    model = save_model(CONFIGS["llama"], "heterolora", tmp_path / "run", state_of_method={"off": dict.fromkeys(off, 3)})
    run(monkeypatch, tmp_path / "run", tmp_path / "out")
    for layer in model.layers:
        if layer.name in off:
            layer.Bt.data.zero_()
    expected = hugging_face(CONFIGS["llama"], model, torch.float32)(tokens()).logits
    found = load_plain(SavedWeights.open(tmp_path / "out")).module.logits(tokens()).transpose(0, 1)
    assert (found - expected).abs().max() < 1e-4

    flags = {"hetero_shortcuts": "combined"}
    model = save_model(CONFIGS["llama"], "heterolora", tmp_path / "short", **flags)
    with pytest.raises(
        ConfigError, match=r"shortcuts.*7 on, such as layers\.0\.shortcut\.cross_in.*--without-shortcuts"
    ):
        run(monkeypatch, tmp_path / "short", tmp_path / "without")
    run(monkeypatch, tmp_path / "short", tmp_path / "without", "--without-shortcuts")
    model.layers[:] = [layer for layer in model.layers if not layer.is_shortcut]
    expected = hugging_face(CONFIGS["llama"], model, torch.float32)(tokens()).logits
    found = load_plain(SavedWeights.open(tmp_path / "without")).module.logits(tokens()).transpose(0, 1)
    assert (found - expected).abs().max() < 1e-4
    all_off = {"off": dict.fromkeys((f"layers.{n}.shortcut.{k}" for n in (0, 1) for k in SHORTCUTS), 1)}
    save_model(CONFIGS["llama"], "heterolora", tmp_path / "none", state_of_method=all_off, **flags)
    run(monkeypatch, tmp_path / "none", tmp_path / "plain")


def test_what_exists_or_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(CONFIGS["llama"], "lora", tmp_path / "run")
    with pytest.raises(ConfigError, match="there is no checkpoint folder"):
        run(monkeypatch, tmp_path / "other", tmp_path / "out")
    (tmp_path / "full").mkdir()
    with pytest.raises(ConfigError, match="the output exists"):
        run(monkeypatch, tmp_path / "run", tmp_path / "full")

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalowrank.checkpoint.fresh.fsync", no_space)
    with pytest.raises(TrainingError, match="cannot write .*No space left"):
        run(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["full", "run"]
