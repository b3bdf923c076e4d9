"""Pickles in folders of checkpoints, data and tokenizers: the program refuses them by name and never unpickles one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from tests.checkpoint.malicious_cases import payloads, plant_in_checkpoint, plant_in_data, plant_in_tokenizer
from tests.corpus import TinyCorpus
from tests.front_door_cases import METHOD, MODEL, PROGRAM, TRAIN
from tests.harness import run_program, run_ranks

FLAGS = [*f"--ds-config ds_configs/zero1.json {MODEL} {METHOD} {TRAIN}".split()]
CHECKPOINT = ("rank_00000.safetensors", "manifest.json", "manifest.sha256", "latest")
DATA = (".idx", ".bin", ".json", ".sizes", ".model")
KINDS = ("pickle", "text", "zip", "legacy")


@pytest.fixture(scope="module")
def saved(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_program([PROGRAM, *FLAGS, *tiny_corpus.flags(), "--save", str(folder), "--exit-interval", "2"])
    return folder


def test_the_bombs_go_off(tmp_path: Path) -> None:
    """Otherwise the other tests would show nothing."""
    marker = tmp_path / "ran"
    for kind, payload in payloads(marker).items():
        if kind in ("zip", "legacy"):
            torch.load(io.BytesIO(payload), weights_only=False)
        else:
            pickle.loads(payload)
        marker.rmdir()  # raises unless it is there


def test_none_goes_off_in_the_program(saved: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """One process starts the program with each of them."""
    marker = tmp_path / "ran"
    cases: dict[str, list[str]] = {}
    for kind, payload in payloads(marker).items():
        for file in CHECKPOINT:
            planted = plant_in_checkpoint(saved, tmp_path / f"{kind} {file}", file, payload)
            for load in ("auto", str(planted)) if file != "latest" else (str(planted),):
                words = ["--save", str(planted), "--load", load]
                cases[f"{kind} {file} {load == 'auto'}"] = [*FLAGS, *tiny_corpus.flags(), *words]
        for ending in DATA:
            planted_flags = plant_in_data(tiny_corpus, tmp_path / f"{kind}{ending}", ending, payload)
            cases[f"{kind} tiny{ending} False"] = [*FLAGS, *planted_flags]
        folder = str(plant_in_tokenizer(tmp_path / f"{kind} tokenizer", payload))
        cases[f"{kind} tokenizer False"] = [*FLAGS, *tiny_corpus.flags()[:2], "--tokenizer-model", folder]
    found = run_ranks("tests.front_door_cases:refusals", 1, list(cases.values()), tmp_path)[0]
    assert len(found) == len(KINDS) * (2 * len(CHECKPOINT) - 1 + len(DATA) + 1)
    for name, message in zip(cases, found, strict=True):
        file = name.split()[1]
        named = "finds no intact checkpoint" if name.endswith("True") else file
        assert message and len(message.splitlines()) == 1, name
        assert named in message or file.startswith("rank_") and file in message, (name, message)
        assert "code of the tokenizer ran" not in message
    assert not marker.exists()
