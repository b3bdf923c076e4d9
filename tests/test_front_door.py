"""The program as a user starts it: with deepspeed, torchrun, srun and alone; resumed; and refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors

from megalowrank.config import ModelConfig
from megalowrank.data.sampler import BatchSampler
from megalowrank.data.tokens import TokenFile, TokenWindow, split_documents
from megalowrank.engine.setup import pretrain
from megalowrank.errors import run_main
from megalowrank.methods.full_rank import FullRank
from megalowrank.models.build import build_llama
from megalowrank.parallel.groups import initialize_single_process
from megalowrank.parallel.launch import free_port
from tests.corpus import TinyCorpus
from tests.front_door_cases import (
    BIN,
    ITERS,
    LENGTH,
    METHOD,
    MODEL,
    PROGRAM,
    TOTAL,
    TRAIN,
    environment,
    finish,
    plain,
    records,
    start,
    succeed,
    training,
)
from tests.harness import ROOT, run_program, run_ranks

PROMISED = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_time_ms", "method_time_ms",
    "memory_bytes", "skipped", "switched_vectors",
}  # fmt: skip
OF_THE_MACHINE = {
    "tokens_per_second", "step_time_ms", "method_time_ms", "data_time_ms", "memory_bytes", "tflops_per_rank",
}  # fmt: skip


def flags_of(corpus: TinyCorpus, ds_config: str = "zero2") -> list[str]:
    words = f"--ds-config ds_configs/{ds_config}.json {MODEL} {METHOD} {TRAIN}"
    return [*words.split(), *corpus.flags()]


def without_machine(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in OF_THE_MACHINE} for record in found]


# ---------------------------------------------------------------- launchers


@pytest.fixture(scope="module")
def by_deepspeed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of two ranks under the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("deepspeed") / "run"
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    output = ["--save", str(folder / "checkpoints"), "--output-dir", str(folder)]
    return folder, succeed([*launcher, PROGRAM, *flags_of(tiny_corpus), *output])


def test_metrics(by_deepspeed: tuple[Path, str]) -> None:
    lines = training(by_deepspeed[0])
    assert [line["step"] for line in lines] == list(range(1, ITERS + 1))
    for line in lines:
        assert line.keys() >= PROMISED
        assert all(math.isfinite(line[key]) for key in PROMISED)
        assert line["tokens"] == line["step"] * TOTAL * LENGTH
        assert line["skipped"] == 0 and line["memory_bytes"] > 1e6 and line["grad_norm"] > 0
        assert 0 <= line["method_time_ms"] < line["step_time_ms"]
        seconds = line["step_time_ms"] / 1000
        assert line["tokens_per_second"] == pytest.approx(TOTAL * LENGTH / seconds, rel=1e-6)
    assert lines[0]["loss"] == pytest.approx(math.log(320), rel=0.03) and lines[-1]["loss"] < 5.5
    warm, peak, decay = 2, 1e-2, ITERS - 2
    rates = [peak * t / warm if t < warm else peak / 2 * (1 + math.cos(math.pi * (t - warm) / decay)) for t in range(8)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert sum(line["switched_vectors"] for line in lines) > 0


def test_first_losses_are_those_of_the_initial_model(
    by_deepspeed: tuple[Path, str], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The learning rate of the first update is 0, so two batches see the initial weights, of a plain model here."""
    initialize_single_process(str(tmp_path / "store"))
    shape = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
    plain_model = build_llama(replace(shape, vocab_size=320), FullRank(None), length=LENGTH, seed=1234).module
    file = TokenFile(tiny_corpus.prefix)
    start, stop = split_documents(file, "80,20,0")[0]
    samples = BatchSampler(TokenWindow(file, start, stop, LENGTH), 1234, TOTAL)
    expected = [float(plain_model(samples.micro_batch(update, 0, TOTAL, 0, 1))) for update in range(2)]
    assert [line["loss"] for line in training(by_deepspeed[0])[:2]] == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_evaluations(by_deepspeed: tuple[Path, str]) -> None:
    folder, out = by_deepspeed
    found = [record for record in records(folder) if "eval_loss" in record]
    assert [record["step"] for record in found] == [4, 8]
    assert found[1]["eval_loss"] < found[0]["eval_loss"] < math.log(320)
    manifest_ratio = [record["eval_loss"] / math.log(2) / record["eval_bits_per_byte"] for record in found]
    assert manifest_ratio[0] == pytest.approx(manifest_ratio[1])
    assert f"held-out loss:  {found[1]['eval_loss']:.4f} nats per token" in out


def test_run_json_and_checkpoint(by_deepspeed: tuple[Path, str], tiny_corpus: TinyCorpus) -> None:
    folder, out = by_deepspeed
    run = json.loads((folder / "run.json").read_text())
    assert (run["method"], run["world_size"], run["method_config"]["lora_rank"]) == ("switchlora", 2, 8)
    assert (run["train"]["micro_batch_size"], run["train"]["global_batch_size"]) == (2, TOTAL)
    assert (run["model"]["vocab_size"], run["deepspeed"]["zero_optimization"]["stage"]) == (320, 2)
    assert (run["data"]["data_path"], run["unigram_loss"] > 1) == ([str(tiny_corpus.prefix)], True)
    saved = folder / "checkpoints" / f"step_{ITERS:08d}"
    assert (saved.parent / "latest").read_text().strip() == saved.name
    assert json.loads((saved / "manifest.json").read_text())["state"]["run"] == run
    names = set()
    for rank in range(2):
        with safetensors.safe_open(saved / f"rank_{rank:05d}.safetensors", framework="pt") as file:
            names |= {name.split("#")[0] for name in file.keys()}  # noqa: SIM118
    assert {"master/embedding.weight", "weight/layers.0.attention.q.weight", "master/layers.1.mlp.down.A"} <= names
    assert f"update {ITERS}/{ITERS}" in out and "trainable" in out and "2 rank(s) on cpu" in out


def test_plots_of_the_run(by_deepspeed: tuple[Path, str], tmp_path: Path) -> None:
    folder = by_deepspeed[0]
    out = succeed([str(BIN / "python"), "tools/plot_run.py", str(folder), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.png")} >= {"loss.png", "schedule.png", "spectrum.png"}
    assert "layers.1.mlp.down: effective rank" in out and "(r = 8)" in out


def test_torchrun_trains_the_same(by_deepspeed: tuple[Path, str], tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    launcher = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    succeed([*launcher, PROGRAM, *flags_of(tiny_corpus), "--output-dir", str(tmp_path)])
    assert without_machine(records(tmp_path)) == without_machine(records(by_deepspeed[0]))


def test_srun_trains_the_same(by_deepspeed: tuple[Path, str], tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    nodes = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    step = {**nodes, "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port())}
    tasks = [
        start(
            plain(*flags_of(tiny_corpus), "--output-dir", str(tmp_path)),
            **{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    (first, out, err), (second, silent, _) = [finish(task) for task in tasks]
    assert (first, second) == (0, 0), err[-3000:]
    assert "update 8/8" in out and "update" not in silent, "one rank speaks"
    assert without_machine(records(tmp_path)) == without_machine(records(by_deepspeed[0]))


# ---------------------------------------------------------------- one process, and a run that goes on


@pytest.fixture(scope="module")
def resumed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run in one piece, the same run in two pieces); both save at 4 and at the end.

    What the first piece saves at its end, after update 5, is cut short, so the second one goes back to 4.
    """
    folder = tmp_path_factory.mktemp("alone")
    whole, pieces = folder / "whole", folder / "pieces"

    def run(output: Path, *more: str) -> str:
        words = ["--save", str(output), "--save-interval", "4", "--load", "auto", *more]
        return run_program([PROGRAM, *flags_of(tiny_corpus, "zero1"), *words])

    run(whole)
    run(pieces, "--exit-interval", "5")
    assert training(pieces)[-1]["step"] == 5
    last = pieces / "step_00000005" / "rank_00000.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    out = run(pieces)
    assert f"not resumed: {last} is damaged" in out and "resumed at update 4 (0 skipped so far)" in out
    return whole, pieces


def test_a_run_in_two_pieces_is_the_run_in_one(resumed: tuple[Path, Path]) -> None:
    whole, pieces = (without_machine(records(folder)) for folder in resumed)
    assert [line["step"] for line in training(resumed[1])] == list(range(1, ITERS + 1)), "every update once"
    assert [line["step"] for line in pieces if "eval_loss" in line] == [4, ITERS]
    assert whole == pieces


def test_both_end_in_the_same_checkpoint(resumed: tuple[Path, Path]) -> None:
    files = [folder / "step_00000008" / "rank_00000.safetensors" for folder in resumed]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_process_learns_like_two(resumed: tuple[Path, Path], by_deepspeed: tuple[Path, str]) -> None:
    alone, together = training(resumed[0]), training(by_deepspeed[0])
    assert [line["loss"] for line in alone] == pytest.approx([line["loss"] for line in together], rel=1e-4)
    assert [line["switched_vectors"] for line in alone] == [line["switched_vectors"] for line in together]


# ---------------------------------------------------------------- refusals before anything starts


def flip(path: Path, at: int = -20) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def edit(words: list[str], flag: str, *values: str) -> list[str]:
    """The flags with other values of one of them; without values it is left out."""
    at = words.index(flag)
    return [*words[:at], *([flag, *values] if values else []), *words[at + 2 :]]


BAD_JSON = {
    "no-json": ("{", "is not JSON"),
    "cut": ('{"zero_optimization": {"stage": 2', "is not JSON"),
    "list": ("[1]", "is not an object"),
    "unknown": ('{"zero_optimisation": {"stage": 2}}', "zero_optimisation is no key"),
    "inner": ('{"zero_optimization": {"stag": 2}}', "zero_optimization.stag is no key"),
    "stage": ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is out of range"),
    "nvme": ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "offload_param.device"),
    "fp16": ('{"fp16": {"enabled": true}}', "fp16.enabled is not supported"),
    "batch": ('{"train_batch_size": 8}', "--global-batch-size and 8 by train_batch_size"),
    "lr": ('{"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}', "--lr and optimizer.params.lr"),
}


def bad_command_lines(corpus: TinyCorpus, folder: Path) -> list[tuple[list[str], str]]:
    """Command lines that must be refused, each with what the message must name."""
    good, prefix = flags_of(corpus), folder / "data"
    found = [
        (edit(good, "--data-path"), "--data-path is missing"),
        (edit(good, "--ds-config"), "--ds-config is missing"),
        (edit(good, "--ds-config", str(folder / "none.json")), "none.json"),
        (edit(good, "--data-path", str(folder / "none")), f"{folder / 'none'}.bin"),
        (edit(good, "--tokenizer-model", str(folder / "none.model")), "none.model"),
        (edit(good, "--tokenizer-model", str(corpus.prefix) + ".bin"), "tiny.bin"),
        (edit(good, "--split", "1,2,3,4"), "--split"),
        (edit(good, "--split", "0,1,0"), "--split"),
        (edit(good, "--split", "999999,1,0"), "--split"),
        (edit(good, "--seq-length", "20000"), "--split"),
        ([*good, "--vocab-size", "300"], "--vocab-size"),
        ([*edit(good, "--tokenizer-model"), "--vocab-size", "300"], "--vocab-size"),
        ([*good, "--micro-batch-size", "3"], "--micro-batch-size"),
        ([*good, "--swich-interval", "3"], "did you mean --switch-interval?"),
        (edit(good, "--method", "lora"), "--switch-interval does not belong to --method lora"),
        ([*good, "--preset", "llama_10m"], "--preset"),
        ([*good, "--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size"),
    ]
    found += [(edit(good, "--data-path", str(prefix / name)), f"{name}.") for name in damaged_data(corpus, prefix)]
    for name, (text, named) in BAD_JSON.items():
        (folder / f"{name}.json").write_text(text)
        found.append((edit(good, "--ds-config", str(folder / f"{name}.json")), named))
    return found


def damaged_data(corpus: TinyCorpus, folder: Path) -> list[str]:
    """Copies of the corpus, each damaged in its own way; returns their names."""

    def cut(path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])

    damages: dict[str, Callable[[Path, Path], object]] = {
        "no-idx": lambda data, index: index.unlink(),
        "no-bin": lambda data, index: data.unlink(),
        "short-bin": lambda data, index: cut(data, data.stat().st_size // 2),
        "short-idx": lambda data, index: cut(index, 100),
        "empty-bin": lambda data, index: cut(data, 0),
        "empty-idx": lambda data, index: cut(index, 0),
        "foreign-idx": lambda data, index: index.write_bytes(b"PK\x03\x04" * 100),
        "big-token": lambda data, index: data.write_bytes(b"\xff\xff" + data.read_bytes()[2:]),
        "no-json": lambda data, index: data.with_suffix(".json").write_text("{}"),
    }
    folder.mkdir()
    for name, damage in damages.items():
        for ending in (".bin", ".idx", ".json"):
            shutil.copy(f"{corpus.prefix}{ending}", folder / f"{name}{ending}")
        damage(folder / f"{name}.bin", folder / f"{name}.idx")
    return list(damages)


def one_line(code: int, err: str, named: str, folder: Path) -> None:
    """A refusal as a user wants to see it."""
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert named in err and "Traceback" not in err, err
    assert not folder.exists()


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: none of these gets as far as a process group."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the program went on")

    monkeypatch.setattr("os.environ", environment(MASTER_ADDR="", MASTER_PORT="0", RANK="0", WORLD_SIZE="1"))
    monkeypatch.setattr("megalowrank.engine.setup.initialize_distributed", never)
    monkeypatch.chdir(ROOT)
    cases = bad_command_lines(tiny_corpus, tmp_path)
    for words, named in cases:
        out = tmp_path / "out"
        argv = [*words, "--output-dir", str(out), "--save", str(out / "checkpoints")]
        with pytest.raises(SystemExit) as caught:
            run_main(lambda argv=argv: pretrain(argv, build_llama, PROGRAM))
        printed = capsys.readouterr()
        assert printed.out == ""
        one_line(int(caught.value.code or 0), printed.err, named, out)
    assert len(cases) == 17 + 9 + len(BAD_JSON)


@pytest.mark.parametrize("case", ["no data", "unknown flag", "no ranks"])
def test_the_program_refuses_in_one_line(case: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    out, more = tmp_path / "out", {}
    words, named = [*flags_of(tiny_corpus), "--output-dir", str(out)], "--lora-ranc, did you mean --lora-rank?"
    if case == "no data":
        words, named = edit(words, "--data-path", str(tmp_path / "none")), "none.bin"
    elif case == "unknown flag":
        words += ["--lora-ranc", "3"]
    else:
        more, named = {"RANK": "0"}, "RANK and WORLD_SIZE must both be set"
    code, printed, err = finish(start(plain(*words), **more))
    assert printed == ""
    one_line(code, err, named, out)


def test_the_deepspeed_launcher_passes_the_exit_code_on(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--log_level", "warning"]
    words = edit(flags_of(tiny_corpus), "--lora-rank", "0")
    code, out, err = finish(start([*launcher, PROGRAM, *words, "--output-dir", str(tmp_path / "out")]))
    ours = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and ours == ["error: --lora-rank is out of range; got 0; allowed: >= 1"], err
    assert "Traceback" not in out + err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- checkpoints that cannot be resumed


def test_a_damaged_checkpoint_names_the_one_before(
    resumed: tuple[Path, Path], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    shutil.copytree(resumed[1], tmp_path / "saved")
    flip(tmp_path / "saved" / "step_00000008" / "rank_00000.safetensors")
    words = [*flags_of(tiny_corpus, "zero1"), "--load", str(tmp_path / "saved"), "--output-dir", str(tmp_path / "out")]
    code, _, err = finish(start(plain(*words)))
    one_line(code, err, "step_00000008/rank_00000.safetensors is damaged", tmp_path / "out")
    assert err.endswith("the one before is step_00000004\n")


def test_other_checkpoints_that_are_refused(
    resumed: tuple[Path, Path], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """One process asks for all of them."""
    saved, damaged = resumed[1], tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    for folder in damaged.glob("step_*"):
        flip(folder / "manifest.json")
    good = [*flags_of(tiny_corpus, "zero1"), "--output-dir", str(tmp_path / "out"), "--load"]
    lora = edit(good, "--method", "lora")
    for name in ("--switch-interval", "--switch-freeze-steps", "--switch-descent-rate"):
        lora = edit(lora, name)
    cases = {
        "there is no checkpoint folder": [*good, str(tmp_path / "none")],
        "is not a checkpoint": [*good, str(tiny_corpus.prefix.parent)],
        "manifest.json or manifest.sha256 beside it is damaged": [*good, str(damaged / "step_00000004")],
        "--load auto finds no intact checkpoint": [*good, "auto", "--save", str(damaged)],
        "--seed differs from the checkpoint step_00000008; got 99; allowed: 1234": [*good, str(saved), "--seed", "99"],
        "--method differs from the checkpoint step_00000008; got lora; allowed: switchlora": [*lora, str(saved)],
        "--num-layers differs from the checkpoint": [*edit(good, "--num-layers", "3"), str(saved)],
        "--seq-length differs from the checkpoint": [*edit(good, "--seq-length", "16"), str(saved)],
        "--global-batch-size differs from the checkpoint": [*edit(good, "--global-batch-size", "8"), str(saved)],
        "--bf16 differs from the checkpoint": [*good, str(saved), "--bf16"],
        "--lora-rank is larger than the matrix": edit([*good, str(saved)], "--lora-rank", "17"),
    }
    found = run_ranks("tests.front_door_cases:refusals", 1, list(cases.values()), tmp_path)[0]
    for named, message in zip(cases, found, strict=True):
        assert named in message and len(message.splitlines()) == 1, (named, message)
    assert not (tmp_path / "out").exists()
