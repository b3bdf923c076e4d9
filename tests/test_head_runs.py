"""The program with heads: on ranks of their own or on one, resumed, refused, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import TinyCorpus
from tests.front_door_cases import ITERS, MODEL, PROGRAM, TRAIN, records, refusals, training
from tests.harness import run_program

LTE = "--method lte --lora-rank 4 --lora-alpha 8 --lte-merge-interval 3 --clip-grad 0"


def launch(ranks: int, words: str, corpus: TinyCorpus, *more: str) -> str:
    """The output of a run on this many ranks."""
    return run_program([PROGRAM, *words.split(), *corpus.flags(), *more], ranks)


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two heads on one rank; on two ranks that stop halfway; two ranks that go on; four heads from there."""
    folder = tmp_path_factory.mktemp("heads")
    found = {name: folder / name for name in ("one", "half", "rest", "said")}
    words = f"{MODEL} {LTE} {TRAIN} --ds-config ds_configs/zero1.json --replica-check-interval 2"
    saved = ["--save", str(folder / "saved")]
    one = ["--lte-heads-per-rank", "2", "--micro-batch-size", "4", "--output-dir", str(found["one"])]
    run_program([PROGRAM, *words.split(), *tiny_corpus.flags(), *one])
    two = ["--lte-heads", "2", "--micro-batch-size", "2"]
    half = ["--exit-interval", str(ITERS // 2), "--output-dir", str(found["half"])]
    said = launch(2, words, tiny_corpus, *two, *saved, *half)
    found["said"].write_text(said)
    launch(2, words, tiny_corpus, *two, "--load", str(folder / "saved"), "--output-dir", str(found["rest"]))
    return found


@pytest.mark.parametrize("key", ["loss", "lr"])
def test_heads_on_ranks_train_what_they_train_on_one_rank(key: str, runs: dict[str, Path]) -> None:
    expected = [line[key] for line in training(runs["one"])]
    found = [line[key] for name in ("half", "rest") for line in training(runs[name])]
    assert len(found) == ITERS and found == pytest.approx(expected, rel=2e-5)


def test_evaluations_are_those_of_the_mean(runs: dict[str, Path]) -> None:
    expected = [line["eval_loss"] for line in records(runs["one"]) if "eval_loss" in line]
    found = [line["eval_loss"] for name in ("half", "rest") for line in records(runs[name]) if "eval_loss" in line]
    assert len(expected) == 2 and found == pytest.approx(expected, rel=2e-5)


def test_merges_and_their_bytes_are_logged(runs: dict[str, Path]) -> None:
    lines = training(runs["half"]) + training(runs["rest"])
    assert [line["merges"] for line in lines] == [0, 0, 0, 1, 0, 0, 1, 0]
    assert all((line["merge_bytes"] > 0) == (line["merges"] > 0) for line in lines)


def test_a_user_reads_of_heads(runs: dict[str, Path]) -> None:
    said = runs["said"].read_text()
    assert "2 rank(s) on cpu" in said and "2 heads x" in said, said


REFUSED = {
    "heads": ("--lte-heads 3", "--lte-heads must divide the number of ranks; got 3 and 1 rank(s)"),
    "clip": ("--lte-heads-per-rank 2 --clip-grad 1", "--lte-heads-per-rank cannot clip"),
    "averaged": ("--lte-heads-per-rank 2 --lte-plain averaged", "nothing to average"),
    "rows": ("--lte-heads-per-rank 3", "--lte-heads-per-rank must divide the micro-batch; got 3 and 4 samples"),
    "tensor": ("--lte-heads-per-rank 2 --tensor-model-parallel-size 2", "must divide the number of ranks"),
    "interval": ("--lte-merge-interval 0", "--lte-merge-interval is out of range"),
    "plain": ("--lte-plain none", "--lte-plain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_heads_cannot_do_is_refused(name: str, tiny_corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, expected = REFUSED[name]
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    words = f"{MODEL} {LTE} {TRAIN} --ds-config ds_configs/zero0.json {flags}"
    (said,) = refusals([[*words.split(), *tiny_corpus.flags()]])
    assert expected in said
