"""Labelled tasks by the program: learned, evaluated on every example once, alike in every layout, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalowrank.checkpoint.plain import load_plain
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.config import ModelConfig
from megalowrank.data.labelled import load_labelled
from megalowrank.data.tokenizers import load_tokenizer
from megalowrank.engine.evaluation import TaskMeasures
from megalowrank.engine.resume import RunState
from megalowrank.engine.task import Task
from megalowrank.errors import ConfigError
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import build_model
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, save_model
from tests.checkpoint.saved_models import LENGTH as SAVED_LENGTH
from tests.engine.task_cases import SIZES, make_task, refusals
from tests.harness import run_ranks

SHAPE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 12 --ffn-hidden-size 64"
RUN = "--global-batch-size 8 --lr 1e-2 --lr-decay-style linear --seed 1 --log-interval 1 --micro-batch-size 4"
FULL, GPT = "--method full", "--method lora --lora-rank 4 --model-family gpt2"
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return {"classes": make_task(folder / "classes"), "values": make_task(folder / "values", values=True)}


class Launch:
    """Flags of the cases of one launch, with a folder and a DeepSpeed file each."""

    def __init__(self, folder: Path, tasks: dict[str, Path]) -> None:
        self.folder, self.tasks, self.cases = folder, tasks, {}
        self.common = f"--task classification {SHAPE} {RUN} --tokenizer-model {tasks['classes'] / 't.model'}".split()

    def add(self, name: str, flags: str, stage: int = 0, task: str = "classes") -> None:
        path = self.folder / f"zero{stage}.json"
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        zero = {"stage": stage, **({"reduce_bucket_size": 1000} if stage else {})}
        path.write_text(json.dumps({**dict.fromkeys(keys, "auto"), "zero_optimization": zero}))
        chosen = (
            f"--ds-config {path} --labelled-data {self.tasks[task]} --output-dir {self.folder / name.replace(' ', '_')}"
        )
        self.cases[name] = [*chosen.split(), *flags.split()]

    def run(self, world: int) -> dict[str, Records]:
        payload = {"common": self.common, "cases": list(self.cases.values())}
        found = run_ranks("tests.engine.task_cases:runs", world, payload, self.folder)
        return dict(zip(self.cases, found[0], strict=True))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Records], Path]:
    """Runs of one process, and the folder of their checkpoints."""
    launch = Launch(tmp_path_factory.mktemp("alone"), tasks)
    launch.add("full", f"{FULL} --epochs 4 --save {launch.folder / 'saved'} --save-interval 10")
    launch.add("rest", f"{FULL} --epochs 4 --load {launch.folder / 'saved' / 'step_00000010'}")
    start = f"--finetune --load {launch.folder / 'saved'} --lr 1e-30 --train-iters 1"
    launch.add("started", f"--method lora --lora-rank 4 {start}")
    launch.add("other", f"{FULL} {start}", task="values")
    launch.add("gpt", f"{GPT} --train-iters 16 --eval-interval 0", task="values")
    return launch.run(1), launch.folder


def training(records: Records) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def evaluations(records: Records) -> Records:
    return [record for record in records if "eval_loss" in record]


def test_a_task_is_learned_in_epochs(alone: tuple[dict[str, Records], Path]) -> None:
    """Four passes over 116 examples by 8 are 58 updates; the evaluations follow the ends of the passes."""
    records, folder = alone
    assert len(training(records["full"])) == 58
    found = evaluations(records["full"])
    assert [line["step"] for line in found] == [15, 29, 44, 58]
    assert found[-1]["eval_accuracy"] > 0.9 and found[-1]["eval_validation_b_accuracy"] > 0.9
    run = json.loads((folder / "full" / "run.json").read_text())
    assert run["labels"] == ["bad", "good"] and run["model"]["num_labels"] == 2 and run["train"]["train_iters"] == 58


def test_measures_are_those_of_every_example_once(
    alone: tuple[dict[str, Records], Path], tasks: dict[str, Path], tmp_path: Path
) -> None:
    """Of 21 examples by 8, computed again from the checkpoint one by one."""
    initialize_single_process(str(tmp_path / "store"))
    records, folder = alone
    model = load_plain(SavedWeights.open(folder / "saved")).module
    tokenizer, data = load_tokenizer(tasks["classes"] / "t.model"), load_labelled(str(tasks["classes"]))
    last = evaluations(records["full"])[-1]
    for name, prefix in (("validation_a", "eval"), ("validation_b", "eval_validation_b")):
        losses, right = [], []
        for example in data.validation[name]:
            tokens = torch.tensor([tokenizer.encode(example.text)])
            with torch.no_grad():
                logits = model.logits(tokens)[-1]
            losses.append(float(F.cross_entropy(logits, torch.tensor([example.label]))))
            right.append(int(logits.argmax()) == example.label)
        assert len(losses) == SIZES[name]
        assert last[f"{prefix}_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert last[f"{prefix}_accuracy"] == pytest.approx(np.mean(right))


def test_a_run_that_stopped_in_an_epoch_goes_on_exactly(alone: tuple[dict[str, Records], Path]) -> None:
    records, _ = alone
    assert training(records["rest"]) == training(records["full"])[10:]
    assert evaluations(records["rest"]) == evaluations(records["full"])


def test_layouts_are_alike(alone: tuple[dict[str, Records], Path], tasks: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks: tensor and sequence parallel, two stages, ZeRO-2."""
    launch = Launch(tmp_path, tasks)
    launch.add("full sp", f"{FULL} --epochs 4 --exit-interval 16 --tensor-model-parallel-size 2 --sequence-parallel", 1)
    launch.add("full zero2", f"{FULL} --epochs 4 --exit-interval 16", 2)
    launch.add("gpt pp", f"{GPT} --train-iters 16 --pipeline-model-parallel-size 2", 1, "values")
    launch.add("gpt tp", f"{GPT} --train-iters 16 --tensor-model-parallel-size 2 --eval-interval 0", 1, "values")
    found = launch.run(2)
    for name in ("full sp", "full zero2", "gpt pp", "gpt tp"):
        expected, records = alone[0][name.split()[0]], found[name]
        for key, tolerance in (("loss", 2e-5), ("grad_norm", 2e-3)):
            values, wanted = ([line[key] for line in lines if key in line] for lines in (records, expected))
            assert values == pytest.approx(wanted[:16], abs=tolerance) and len(values) == 16, name
    for name in ("full sp", "full zero2"):
        assert evaluations(found[name])[0] == pytest.approx(evaluations(alone[0]["full"])[0], abs=2e-5), name
    for name in ("gpt pp", "gpt tp"):
        assert evaluations(found[name])[-1] == pytest.approx(evaluations(alone[0]["gpt"])[-1], abs=2e-5), name
    assert len(evaluations(found["gpt pp"])) == 2, "one for the pass that ended, one at the end"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_of_a_task_is_new_and_the_rest_is_read(name: str, tmp_path: Path) -> None:
    initialize_single_process(str(tmp_path / "store"))
    before = save_model(CONFIGS[name], "full", tmp_path / "run")
    saved = SavedWeights.open(tmp_path / "run")
    assert saved.leave_heads(("a", "b", "c"))
    config = completed(_with_labels(CONFIGS[name], 3), FAMILIES, SAVED_LENGTH)
    model = build_model(config, FullRank(FullRankConfig()), length=SAVED_LENGTH, seed=5, initial=saved.initial)
    saved.check_covered({tensor.name for tensor in model.tensors})
    old = {tensor.name: tensor.parameter for tensor in before.tensors}
    new = {tensor.name: tensor.parameter for tensor in model.tensors}
    assert new.keys() - old.keys() == {"score.weight"} and old.keys() - new.keys() <= {"output.weight"}
    score = new["score.weight"]
    assert score.shape == (3, 48) and 0.1 < float(score.detach().std()) < 0.2
    assert torch.equal(new["embedding.weight"], old["embedding.weight"])


def _with_labels(config: ModelConfig, labels: int) -> ModelConfig:
    return ModelConfig(**{**vars(config), "num_labels": labels})


def test_the_head_of_the_same_task_is_read(alone: tuple[dict[str, Records], Path]) -> None:
    saved = SavedWeights.open(alone[1] / "saved")
    assert not saved.leave_heads(("bad", "good"))
    assert torch.equal(saved.initial("score.weight", (2, 32)), saved.read("score.weight", (2, 32)))
    assert saved.leave_heads(("good", "bad")) and saved.initial("score.weight", (2, 32)) is None


def test_a_new_run_starts_from_the_weights_of_another(alone: tuple[dict[str, Records], Path]) -> None:
    """On the same labels with its head, on others with a new one."""
    records, _ = alone
    expected, started = evaluations(records["full"])[-1], evaluations(records["started"])[-1]
    assert {**started, "step": expected["step"]} == pytest.approx(expected, rel=1e-4)
    assert {"eval_pearson", "eval_loss"} <= evaluations(records["other"])[-1].keys()


def test_a_run_is_resumed_with_the_classes_it_had() -> None:
    method = FullRank(FullRankConfig())
    run = {"model": {}, "train": {}, "method_config": {}, "labels": ("bad", "good")}
    state = RunState(None, method, None, None, run)  # type: ignore[arg-type]
    state._compare({**run, "labels": ["bad", "good"]}, "step_1")
    for labels in (["good", "bad"], None):
        with pytest.raises(ConfigError, match="other classes than the checkpoint step_1; got bad, good"):
            state._compare({**run, "labels": labels}, "step_1")


def test_an_evaluation_follows_the_last_example_of_every_epoch() -> None:
    """Whatever the batch; and an epoch smaller than a batch ends with every update."""
    for examples, batch in ((60, 8), (64, 8), (5, 8), (7, 3)):
        task = Task("t", None, examples, {}, ())
        evaluation = TaskMeasures(task, None, None, batch, None, None, 1, 1, (0, 1))  # type: ignore[arg-type]
        ends = {-(-epoch * examples // batch) for epoch in range(1, 400)}
        assert [n for n in range(1, 40) if evaluation.due(n)] == sorted(end for end in ends if end < 40)


def test_refusals(tasks: dict[str, Path], tmp_path: Path) -> None:
    launch = Launch(tmp_path, tasks)
    launch.add("ok", f"{FULL} --epochs 1")
    base, task = launch.cases["ok"], str(tasks["classes"])
    plain = [word for word in base if word not in ("--epochs", "1")]
    cases = {
        "--data-path has no meaning": [*base, "--data-path", "x"],
        "--eval-iters has no meaning": [*base, "--eval-iters", "3"],
        "--epochs has no meaning with --task language": [*base, "--task", "language-modeling"],
        "--epochs or --train-iters": plain,
        "which are 15 updates, and 9": [*base, "--train-iters", "9"],
        "--num-labels is not that of classes; got 3; allowed: 2": [*base, "--num-labels", "3"],
        "--epochs is out of range": [*base, "--epochs", "0"],
        "--lr-warmup-iters is longer": [*base, "--lr-warmup-iters", "16"],
        "the head of a task has to be trained": [*base, "--method", "lte", "--lora-rank", "4"],
        "the tokenizer is larger than --vocab-size": [*base, "--vocab-size", "300"],
        "cannot read labelled data": [*base, "--labelled-data", str(tasks["classes"] / "t.model" / "x")],
    }
    found = refusals({"common": launch.common, "cases": list(cases.values())})
    for (what, _), said in zip(cases.items(), found, strict=True):
        assert what in said, said
    without = [word for word in launch.common if not word.endswith("t.model") and word != "--tokenizer-model"]
    assert "--tokenizer-model is missing" in refusals({"common": without, "cases": [base]})[0]
    assert not (tmp_path / "ok").exists() and load_labelled(task).labels == ("bad", "good")
