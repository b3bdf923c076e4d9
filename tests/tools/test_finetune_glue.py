"""The comparison by fine-tuning: what it learns, which token is pooled, its table, and going on where it stopped."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from megalowrank.checkpoint.hf.convert import Export, to_hf
from megalowrank.data.labelled import Example, LabelledData
from megalowrank.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megalowrank.errors import TrainingError, run_main
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, save_model
from tests.data.hf_tokenizers import END, make_byte_level
from tests.harness import ROOT

WORDS = 300
FLAGS = "--epochs 6 --batch-size 8 --lr 2e-3 --seeds"
TEXTS = [
    f"{first} {second} {'good' if number % 2 else 'bad'}"
    for number, (first, second) in enumerate((a, b) for a in ("a", "the", "no", "one", "my") for b in "klmnopqr")
]


@pytest.fixture(scope="module", autouse=True)
def tool() -> Any:
    """The program as it runs: its folder is first on the path."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("finetune_glue")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with factors, the same as a Hugging Face folder, and a task of two words."""
    made = tmp_path_factory.mktemp("glue")
    make_byte_level(made / "tokenizer", TEXTS, WORDS)
    initialize_single_process(str(made / "store"))
    config = replace(CONFIGS["opt"], vocab_size=WORDS)
    save_model(config, "switchlora", made / "ours" / "checkpoints", tokenizer=str(made / "tokenizer"))
    to_hf(made / "ours" / "checkpoints", made / "theirs", Export(), lambda line: None)
    (made / "words").mkdir()
    for name, chosen in (("train", TEXTS[:32]), ("validation", TEXTS[32:])):
        rows = [{"text": text, "label": text.rsplit(" ", 1)[1]} for text in chosen]
        (made / "words" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of the program."""
    monkeypatch.setattr(sys, "argv", ["finetune_glue.py", *map(str, words)])
    try:
        run_main(tool.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_checkpoint_and_its_export_learn_the_same(
    tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two words are told apart; a second command does the second seed alone, and the table has both."""
    done: list[int] = []
    right = tool.finetune
    monkeypatch.setattr(tool, "finetune", lambda *args: done.append(args[-1]) or right(*args))
    out = folder / "out"
    words = [folder / "ours", f"hf={folder / 'theirs'}", "--tasks", folder / "words", "--output", out]
    assert run(tool, monkeypatch, *words, *FLAGS.split(), "1") == 0
    (out / "cells" / "ours__words__seed1.json").unlink()
    assert run(tool, monkeypatch, *words, *FLAGS.split(), "1", "2") == 0
    assert done == [1, 1, 1, 2, 2] and "4 to fine-tune, 1 of them finished before" in capsys.readouterr().out
    records = json.loads((out / "results.json").read_text())["results"]
    found = {(record["model"], record["measure"]): record for record in records}
    ours, theirs = found["ours", "accuracy"], found["hf", "accuracy"]
    assert ours["seeds"] == [1, 2] and min(ours["last"]["values"]) >= 0.9
    for name in ("accuracy", "f1", "matthews"):
        assert found["ours", name]["last"] == found["hf", name]["last"], "the export computes the same"
    first = json.loads((out / "cells" / "hf__words__seed1.json").read_text())["epochs"]["validation"]
    other = json.loads((out / "cells" / "hf__words__seed2.json").read_text())["epochs"]["validation"]
    assert len(first) == 6 and first != other, "seeds differ"
    assert theirs["best"]["values"][0] == max(line["accuracy"] for line in first)
    assert "| ours | 1.0000 ± 0.0000 (2) |" in (out / "table.md").read_text()


def test_values_and_several_validation_sets(
    tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A regression on as few examples as asked for; each set has a column of its own."""
    (folder / "values").mkdir()
    for name, chosen in (("train", TEXTS[:32]), ("validation_one", TEXTS[30:]), ("validation_two", TEXTS[20:30])):
        rows = [{"text": text, "label": number % 2 + 0.5} for number, text in enumerate(chosen)]
        (folder / "values" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[int] = []
    right = tool.finetune
    monkeypatch.setattr(tool, "finetune", lambda *args: seen.append(len(args[2].train)) or right(*args))
    words = [folder / "theirs", "--tasks", folder / "values", "--output", folder / "reg", "--train-examples", "16"]
    assert run(tool, monkeypatch, *words, *FLAGS.split(), "1") == 0 and seen == [16]
    measures = "values pearson | values spearman | values validation_two pearson | values validation_two spearman"
    assert f"| model | {measures} |" in capsys.readouterr().out
    records = json.loads((folder / "reg" / "results.json").read_text())["results"]
    found = {(record["task"], record["measure"]): record["last"]["mean"] for record in records}
    assert min(found["values", "pearson"], found["values validation_two", "pearson"]) > 0.8
    assert found["values", "loss"] < 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "opt"])
@torch.no_grad()
def test_the_last_real_token_is_pooled(family: str, tool: ModuleType, tmp_path: Path) -> None:
    """Also of a text that ends in the token that others are filled up with."""
    rows, train = importlib.import_module("finetuning.rows"), importlib.import_module("finetuning.train")
    make_byte_level(tmp_path / "tokenizer", TEXTS, WORDS)
    initialize_single_process(str(tmp_path / "store"))
    name = str(tmp_path / "tokenizer")
    save_model(replace(CONFIGS[family], vocab_size=WORDS), "full", tmp_path / "run", tokenizer=name)
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), lambda line: None)
    texts = ["good", f"a b c{END}", f"one{END}{END}", "no or yes"]
    data = LabelledData("it", ("n", "y"), [Example(text, None, 0) for text in texts], {}, [])
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    encoded = rows.encode_task(tokenizer, data, 20)
    assert encoded.train[1]["input_ids"][-1] == tokenizer.eos_id() != encoded.padding
    model = train.load_classifier(tmp_path / "hf", data, encoded.padding).eval()
    batch = rows.collate(encoded.train, encoded.padding)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in encoded.train]
    found = model(**batch).logits
    for number, row in enumerate(encoded.train):
        hidden = model.base_model(torch.tensor([row["input_ids"]])).last_hidden_state[0, -1]
        assert torch.allclose(found[number], model.score(hidden), atol=1e-5)
    model.config.pad_token_id = tokenizer.eos_id()
    naive = model(**rows.collate(encoded.train, tokenizer.eos_id())).logits
    assert (naive[1:3] - found[1:3]).abs().max() > 1e-3, "with the usual choice another token would be read"


def test_what_a_tokenizer_puts_around_a_text_is_kept(tool: ModuleType, tmp_path: Path) -> None:
    rows = importlib.import_module("finetuning.rows")
    make_byte_level(tmp_path, TEXTS, WORDS)
    plain = load_tokenizer(tmp_path)
    data = LabelledData("it", ("n", "y"), [Example("good bad", "one", 1), Example("bad", None, 0)], {}, [])
    end, bare = plain.eos_id(), rows.encode_task(plain, data, 20)
    first, second = plain.encode("good bad"), plain.encode("one")
    assert [row["input_ids"] for row in bare.train] == [[*first, end, *second], plain.encode("bad")]
    plain.inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, end)]
    )
    found = rows.encode_task(plain, data, 20)
    assert [row["input_ids"] for row in found.train] == [[end, *row["input_ids"], end] for row in bare.train]
    short = rows.encode_task(plain, data, 5)
    assert max(len(row["input_ids"]) for row in short.train) == 5 and (found.cut, short.cut) == (0, 1)
    assert found.padding not in (end, bare.train[0]["input_ids"][-1])


def test_the_table_is_that_of_the_statistics_module(tool: ModuleType) -> None:
    results = importlib.import_module("finetuning.results")
    values = {1: [0.5, 0.9, 0.7], 2: [0.8, 0.6, 0.4], 3: [0.2, 0.3, 0.3]}
    cells = {
        results.Cell("m", "rte", seed): {"validation": [{"accuracy": v, "f1": v / 2} for v in line]}
        for seed, line in values.items()
    }
    cells[results.Cell("n", "rte", 1)] = {"validation": [{"accuracy": 0.25, "f1": 0.5}]}
    records = results.summary(cells)
    last, best = [0.7, 0.4, 0.3], [0.9, 0.8, 0.3]
    found = {(record["model"], record["measure"]): record for record in records}["m", "f1"]
    halves = {"last": [v / 2 for v in last], "best": [v / 2 for v in best]}
    for kind, line in halves.items():
        assert math.isclose(found[kind]["mean"], statistics.mean(line))
        assert math.isclose(found[kind]["stdev"], statistics.stdev(line)) and found[kind]["values"] == line
    text = results.markdown(records, "recipe")
    rows = [f"| m | {statistics.mean(line):.4f} ± {statistics.stdev(line):.4f} (3) |" for line in (last, best)]
    assert "| model | rte accuracy | rte f1 |" in text and all(row in text for row in rows)
    assert text.count("| n | 0.2500 (1) | 0.5000 (1) |") == 2


def settings_of_another(folder: Path) -> list[Any]:
    cell = {"settings": {"epochs": 99}, "epochs": {}}
    (folder / "old" / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "old" / "cells" / "theirs__words__seed1.json").write_text(json.dumps(cell))
    return [folder / "theirs", "--tasks", folder / "words", "--output", folder / "old"]


def without_tokenizer(folder: Path) -> list[Any]:
    save_model(CONFIGS["gpt2"], "full", folder / "bare" / "checkpoints")
    return [folder / "bare", "--tasks", folder / "words", "--output", folder / "new"]


REFUSED: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no model": (lambda at: [at / "nowhere", "--tasks", at / "words"], "no such folder of a model"),
    "one name twice": (lambda at: [at / "ours", at / "ours", "--tasks", at / "words"], "a name of its own; got ours"),
    "one task twice": (lambda at: [at / "ours", "--tasks", at / "words", at / "words"], "two tasks have one name"),
    "no task": (lambda at: [at / "ours", "--tasks", at / "ours"], "no train.jsonl"),
    "out of reach": (lambda at: [at / "ours", "--tasks", "rte"], "cannot read labelled data rte"),
    "learning rate": (lambda at: [at / "ours", "--tasks", at / "words", "--lr", "0"], "--lr is out of range; got 0.0"),
    "seeds": (lambda at: [at / "ours", "--tasks", at / "words", "--seeds", "1", "1"], "--seeds names one twice"),
    "length": (lambda at: [at / "theirs", "--tasks", at / "words", "--max-length", "2", "--output", at / "new"],
               "--max-length leaves no room"),
    "other settings": (settings_of_another, "was made with other epochs; got 30 now, 99 before"),
    "no tokenizer": (without_tokenizer, "bare has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(
    name: str, tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = REFUSED[name]
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert run(tool, monkeypatch, *make(folder), *([] if name == "seeds" else ["--seeds", "1"])) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def unreachable(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionError("no network")


def test_one_that_diverges_does_not_end_the_others(
    tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finetune(*args: Any) -> Any:
        if args[-1] == 2:
            raise TrainingError("no numbers")
        return {"validation": [{"accuracy": args[-1] / 10}]}

    monkeypatch.setattr(tool, "finetune", finetune)
    model = folder / "copy"
    shutil.copytree(folder / "theirs", model)
    words = [f"theirs={model}", "--tasks", folder / "words", "--output", folder / "some", "--seeds", "1", "2", "3"]
    assert run(tool, monkeypatch, *words) == 1
    said = capsys.readouterr()
    assert "| theirs | 0.2000 ± 0.1414 (2) |" in said.out and "1 diverged" in said.err and "seed 2" in said.err
    assert sorted(path.name[-6] for path in (folder / "some" / "cells").iterdir()) == ["1", "3"]
    file = model / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert run(tool, monkeypatch, *words) == 2 and "was made with other weights" in capsys.readouterr().err
