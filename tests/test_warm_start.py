"""``--load`` with ``--finetune``: the weights of a run, a new method, update 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import TinyCorpus
from tests.front_door_cases import ITERS, MODEL, PROGRAM, TRAIN, records, training
from tests.harness import run_program, run_ranks

RELORA = "--method relora --lora-rank 8 --relora-interval 3 --lr-decay-style cosine_restarts --relora-reset magnitude"


def flags(corpus: TinyCorpus, method: str, ds_config: str = "zero2") -> list[str]:
    return [*f"--ds-config ds_configs/{ds_config}.json {MODEL} {TRAIN} {method}".split(), *corpus.flags()]


@pytest.fixture(scope="module")
def trained(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-rank run of one rank."""
    folder = tmp_path_factory.mktemp("trained") / "full"
    run_program([PROGRAM, *flags(tiny_corpus, "--method full"), "--save", str(folder)])
    return folder


def held_out(folder: Path) -> list[float]:
    return [record["eval_loss"] for record in records(folder) if "eval_loss" in record]


def test_relora_goes_on_from_full_rank_weights(trained: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Two ranks at ZeRO-3 in bfloat16 from a float32 run of one rank."""
    warm = ["--load", str(trained), "--finetune", "--save", str(tmp_path / "warm"), "--bf16"]
    run_program([PROGRAM, *flags(tiny_corpus, RELORA, "zero3"), *warm], 2)
    first, last = training(trained)[0], training(tmp_path / "warm")[-1]
    begun = training(tmp_path / "warm")[0]
    assert begun["step"] == 1 and begun["loss"] < first["loss"] - 0.2, "the weights are those of the trained model"
    assert begun["loss"] == pytest.approx(held_out(trained)[-1], abs=0.4)
    assert last["step"] == ITERS
    assert sum(line["merges"] for line in training(tmp_path / "warm")) == 2
    assert 0.85 < last["zeroed_exp_avg"] == last["zeroed_exp_avg_sq"] < 0.95
    rates = {line["step"] - 1: line["lr"] for line in training(tmp_path / "warm")}
    resumed = run_program([PROGRAM, *flags(tiny_corpus, RELORA, "zero3"), *warm], 2)
    assert f"resumed at update {ITERS}" in resumed, "the same command goes on with what it began"
    assert rates[0] == 0.0 and rates[4] > 0 and min(rates.values()) == 0.0


def test_the_function_is_the_same_whatever_adapters_are_put_on(
    trained: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """At learning rate 0 the held-out loss stays what it was; the checkpoint of the new run loads again."""
    for number, method in enumerate(
        (RELORA, "--method switchlora --lora-rank 8 --switch-interval 20", "--method full")
    ):
        words = [
            *flags(tiny_corpus, method),
            "--load",
            str(trained),
            "--finetune",
            "--lr",
            "1e-30",
            "--train-iters",
            "3",
        ]
        words = [*words, "--lr-warmup-iters", "0", "--save", str(tmp_path / str(number))]
        run_program([PROGRAM, *words])
        assert held_out(tmp_path / str(number))[-1] == pytest.approx(held_out(trained)[-1], abs=1e-5)


def test_what_cannot_be_a_start(trained: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """One process asks for all of them; nothing is written."""
    load = ["--finetune", "--load", str(trained)]
    cases = [
        (["--finetune"], "--finetune needs --load"),
        (["--finetune", "--load", "auto", "--save", str(tmp_path / "x")], "--finetune needs --load"),
        ([*load, "--save", str(trained)], "would overwrite its run"),
        ([*load[:-1], str(trained / f"step_{ITERS:08d}"), "--save", str(trained)], "would overwrite its run"),
        ([*load, "--num-layers", "3"], "lacks layers.2."),
        ([*load, "--num-layers", "1"], "a weight that the model lacks: layers.1."),
        ([*load, "--ffn-hidden-size", "56"], "has another shape"),
    ]
    base = [*flags(tiny_corpus, RELORA), "--output-dir", str(tmp_path / "out")]
    found = run_ranks("tests.front_door_cases:refusals", 1, [[*base, *more] for more, _ in cases], tmp_path)[0]
    for (_, named), message in zip(cases, found, strict=True):
        assert named in message and len(message.splitlines()) == 1, (named, message)
    again = run_ranks("tests.front_door_cases:refusals", 1, [[*base, "--save", str(trained)]], tmp_path)[0]
    assert "--save has checkpoints of an earlier run" in again[0] and "--load auto" in again[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()
