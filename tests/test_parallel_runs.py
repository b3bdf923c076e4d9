"""The programs under tensor, sequence and pipeline parallelism: the run of one process, resumed, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalowrank.engine.setup import pretrain
from megalowrank.errors import run_main
from megalowrank.models.build import build_llama
from tests.corpus import TinyCorpus
from tests.front_door_cases import ITERS, METHOD, MODEL, PROGRAM, TRAIN, environment, training
from tests.harness import ROOT, run_program

GPT = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --model-family gpt2"
ALL = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]


def launch(program: str, ranks: int, words: str, corpus: TinyCorpus, *more: str) -> str:
    """The output of a run on this many ranks."""
    return run_program([program, *words.split(), *corpus.flags(), *more], ranks)


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process; four ranks that stop halfway; two ranks that go on from there."""
    folder = tmp_path_factory.mktemp("parallel")
    words = f"{MODEL} {METHOD} {TRAIN} --micro-batch-size 2 --replica-check-interval 2"
    found = {name: folder / name for name in ("alone", "four", "two")}

    def go(name: str, ranks: int, ds_config: str, *more: str) -> str:
        out = ["--output-dir", str(found[name]), "--ds-config", f"ds_configs/{ds_config}.json"]
        return launch(PROGRAM, ranks, words, tiny_corpus, *out, *more)

    go("alone", 1, "zero0")
    half = ["--save", str(folder / "saved"), "--exit-interval", str(ITERS // 2), "--comms-summary"]
    (folder / "said").write_text(go("four", 4, "zero1_pp", *ALL, *half))
    go("two", 2, "zero2", "--tensor-model-parallel-size", "2", "--load", str(folder / "saved"))
    return {**found, "said": folder / "said"}


def numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "switched_vectors", "lr"])
def test_four_ranks_and_then_two_train_what_one_does(key: str, runs: dict[str, Path]) -> None:
    expected, half = numbers(training(runs["alone"]), key), ITERS // 2
    assert numbers(training(runs["four"]), key) == pytest.approx(expected[:half], rel=2e-5)
    assert numbers(training(runs["two"]), key) == pytest.approx(expected[half:], rel=2e-5)


def test_what_a_user_reads_of_four_ranks(runs: dict[str, Path]) -> None:
    said = runs["said"].read_text()
    layout = "tensor-parallel size 2 with sequence parallelism x pipeline stages 2 x data-parallel size 1"
    for part in (layout, "4 rank(s) on cpu", "pipeline bubble", "low-rank products: attention.qkv", "memory, stage 0"):
        assert part in said, said
    assert "pipe" in said and "tensor" in said, "the summary of collectives names the groups"


@pytest.mark.parametrize(
    ("program", "shape"), [("pretrain_gpt.py", GPT), (PROGRAM, f"{MODEL} --tie-word-embeddings")], ids=["gpt2", "llama"]
)
def test_a_tied_table_in_two_stages(program: str, shape: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    words = f"{shape} {METHOD} {TRAIN} --micro-batch-size 2 --replica-check-interval 1"
    layouts = {"one": (1, "zero0", []), "two": (2, "zero1_pp", ["--pipeline-model-parallel-size", "2"])}
    for name, (ranks, ds_config, more) in layouts.items():
        files = ["--output-dir", str(tmp_path / name), "--ds-config", f"ds_configs/{ds_config}.json"]
        launch(program, ranks, words, tiny_corpus, *files, *more)
    found, expected = (numbers(training(tmp_path / name), "loss") for name in ("two", "one"))
    assert found == pytest.approx(expected, rel=2e-5)


TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
REFUSED: dict[str, tuple[str, int, list[str], str]] = {
    "ranks": ("zero1_pp", 3, [TP, "2"], "must divide the number of ranks"),
    "zero 2": ("zero2", 2, [PP, "2"], "ZeRO stage 2 or 3 is not supported: DeepSpeed's pipeline reduces"),
    "zero 3": ("zero3", 2, [PP, "2"], "ZeRO stage 2 or 3 is not supported"),
    "zero 0": ("zero0", 2, [PP, "2"], "ZeRO stage 0 is not supported: DeepSpeed's gradient norm"),
    "overlap": ("zero1", 2, [PP, "2"], "overlap_comm is not supported: DeepSpeed's pipeline would never"),
    "stages": ("zero1_pp", 4, [PP, "4"], "above --num-layers is not supported: every stage computes"),
    "zero 0 bf16": ("zero0", 2, [TP, "2", "--bf16"], "stage 0 in bf16 is not supported"),
    "groups": ("zero1_pp", 4, [TP, "4"], "--num-query-groups must be a multiple of --tensor-model-parallel-size"),
    "heads": ("zero1_pp", 8, [TP, "8"], "--num-attention-heads must be a multiple of --tensor-model-parallel-size"),
    "positions": ("zero1_pp", 2, [TP, "2", "--sequence-parallel", "--seq-length", "31"], "--seq-length that does not"),
    "sequence alone": ("zero1", 1, ["--sequence-parallel"], "--sequence-parallel needs --tensor-model-parallel-size"),
    "schedule alone": ("zero1", 1, ["--lowrank-schedule", "ride"], "--lowrank-schedule has no effect without"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name_before_anything_starts(
    name: str, tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ds_config, world, more, reason = REFUSED[name]
    monkeypatch.setattr("os.environ", environment(MASTER_ADDR="", MASTER_PORT="0", RANK="0", WORLD_SIZE=str(world)))
    monkeypatch.chdir(ROOT)
    total = ["--global-batch-size", str(4 * world)]
    words = f"--ds-config ds_configs/{ds_config}.json {MODEL} {METHOD} {TRAIN} --micro-batch-size 2".split()
    argv = [*words, *tiny_corpus.flags(), *total, *more, "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: pretrain(argv, build_llama, PROGRAM))
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == "" and not (tmp_path / "out").exists()
    assert reason in printed.err and len(printed.err.splitlines()) == 1, printed.err
