"""The search for ranks, as a user starts it, and what becomes of its scores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from megalowrank.errors import ConfigError
from megalowrank.lowrank.rank_table import rank_table
from tests.corpus import TinyCorpus
from tests.front_door_cases import MODEL
from tests.harness import run_program
from tools import search_rank

RUN = "--ds-config ds_configs/zero0.json --seq-length 32 --global-batch-size 4 --lr 1e-2 --eval-iters 0"


def test_a_file_that_lora_trains(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """3 of 14 matrices are on; the run of the search leaves nothing behind."""
    out = tmp_path / "ranks.toml"
    flags = f"--score snip --warmup-iters 2 --score-batches 2 {MODEL} {RUN} --lora-rank=4".split()
    said = run_program(["tools/search_rank.py", str(out), *flags, *tiny_corpus.flags()])
    assert f"3 entries are on: written to {out}" in said and list(tmp_path.iterdir()) == [out]
    table = rank_table(str(out))
    assert table is not None and table.layered and not table.default.enabled
    assert [(e.enabled, e.rank, e.alpha) for e in table.entries.values()] == [(True, 4, 16.0)] * 3
    command = ["pretrain_llama.py", *f"{MODEL} {RUN}".split(), "--train-iters", "2", "--dry-run"]
    said = run_program([*command, "--method", "lora", "--lora-config", str(out), *tiny_corpus.flags()])
    assert "dry run" in said


@pytest.mark.parametrize(
    ("granularity", "shortcuts", "on"),
    [
        ("layer", "off", ["1.q"]),
        ("network", "off", ["q"]),
        ("layer", "separated", ["1.q", "0.residual_1", "0.cross_in"]),
        ("network", "combined", ["q", "residual_1"]),
    ],
)
def test_scores_become_entries(granularity: str, shortcuts: str, on: list[str]) -> None:
    """By the sum over blocks in a network."""
    scores = {"layers.0.attention.q": 1.0, "layers.0.attention.v": 3.5, "layers.1.attention.q": 4.0,
              "layers.1.attention.v": 1.0}  # fmt: skip
    if shortcuts != "off":
        scores |= {"layers.0.shortcut.residual_1": 5.0, "layers.0.shortcut.cross_in": 0.5,
                   "layers.1.shortcut.residual_1": 0.2, "layers.1.shortcut.cross_in": 0.1}  # fmt: skip
    budget = 0.25 if granularity == "layer" and shortcuts == "off" else 0.5
    if granularity == "layer" and shortcuts == "separated":
        scores["layers.0.attention.v"], budget = 0.0, 0.49
        on = ["1.q", "0.residual_1", "0.cross_in"]
    args = argparse.Namespace(granularity=granularity, shortcuts=shortcuts, budget=budget, score="snip")
    run = {"train": {"seed": 1}, "method_config": {"lora_rank": 2, "lora_alpha": 3.0}}
    table = search_rank.table_of(scores, args, run)
    assert list(table.entries) == on and not table.default.enabled
    assert {(e.rank, e.alpha) for e in table.entries.values()} == {(2, 3.0)}
    assert rank_table(table.text()) == table


def test_chance_depends_on_the_seed() -> None:
    scores = {f"layers.{i}.attention.{kind}": 1.0 for i in range(6) for kind in "qkvo"}
    args = argparse.Namespace(granularity="layer", shortcuts="off", budget=0.25, score="constant")
    same = {"lora_rank": 2, "lora_alpha": 3.0}
    runs = [{"train": {"seed": seed}, "method_config": same} for seed in (1, 2, 2)]
    first, second, again = (list(search_rank.table_of(scores, args, run).entries) for run in runs)
    assert first != second == again and len(first) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train_iters", "7"], "--train_iters is chosen by this tool"),
        (["--load", "runs/a"], "--load with --finetune"),
    ],
)
def test_what_the_tool_refuses(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["search_rank.py", str(tmp_path / "r.toml"), *words])
    with pytest.raises(ConfigError, match=said):
        search_rank.main()
