"""The model of a labelled task as transformers' model for sequences: the same logits of padded texts, and its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megalowrank.checkpoint.hf.check import padded_probes
from megalowrank.checkpoint.hf.convert import Export, to_hf
from megalowrank.checkpoint.plain import new_run
from megalowrank.data.tokenizers import load_tokenizer, train_tokenizer
from megalowrank.errors import ConfigError, TrainingError
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint import saved_models
from tests.checkpoint.saved_models import CONFIGS, LENGTH, save_model

PIECES = 300
TEXTS = ["a fine film", "dull", "the story of a scene, told twice and"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(TEXTS * 5, path, PIECES)
    return str(path)


def saved(
    family: str, folder: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, labels: list[str] | None
) -> saved_models.BuiltModel:
    """A checkpoint of a task that nobody trained; without labels it is a regression."""
    initialize_single_process(str(folder / "store"))
    monkeypatch.setattr(saved_models, "new_run", lambda *given: {**new_run(*given), "labels": labels})
    outputs = 1 if labels is None else len(labels)
    config = completed(replace(CONFIGS[family], num_labels=outputs, vocab_size=PIECES), FAMILIES, LENGTH)
    return save_model(config, "lora", folder / "run", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("family", "labels"),
    [("llama", ["no", "yes"]), ("gpt2", ["a", "b", "c"]), ("neox", None), ("opt", ["no", "yes"]), ("gpt2", None)],
)
def test_padded_texts(
    family: str, labels: list[str] | None, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(family, tmp_path, tokenizer, monkeypatch, labels).module.eval()
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), lambda line: None)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXTS, padding=True, return_tensors="pt")
    assert (batch["attention_mask"][:, -1] == 0).sum() == 2, "two of the texts are padded, on the right"
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        found = theirs(**{key: batch[key] for key in keys}).logits
        alone = [model.logits(torch.tensor([load_tokenizer(tokenizer).encode(text)]))[-1] for text in TEXTS]
    assert found.shape == (3, len(labels or "1")) and found.std() > 0.05
    assert (found - torch.cat(alone)).abs().max() < 1e-5
    config = theirs.config
    if labels is None:
        assert (config.problem_type, config.num_labels) == ("regression", 1)
    else:
        assert [config.id2label[number] for number in range(len(labels))] == labels
        assert config.label2id == {name: number for number, name in enumerate(labels)}
    assert config.architectures[0].endswith("ForSequenceClassification")
    assert not (tmp_path / "hf" / "generation_config.json").exists()


def test_refusals(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters, and a head that transformers reads otherwise."""
    saved("llama", tmp_path, tokenizer, monkeypatch, ["no", "yes"])
    with pytest.raises(ConfigError, match="does not go with the head of a labelled task"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(adapters=True), lambda line: None)

    def turned(values: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({**values, "score.weight": values["score.weight"].flip(0).contiguous()}, path, metadata)

    monkeypatch.setattr("megalowrank.checkpoint.hf.export.save_file", turned)
    with pytest.raises(TrainingError, match="computes something else"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), lambda line: None)
    assert not (tmp_path / "hf").exists()


def test_probes_end_where_they_say() -> None:
    """No real token is the padding, so that both sides find the same last one."""
    tokens, lengths = padded_probes(20, 9, 4)
    assert lengths.tolist() == [9, 5, 1]
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        assert (row[length:] == 4).all() and (row[:length] != 4).all() and row.max() < 20


def test_the_head_is_stored_under_its_name(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("opt", tmp_path, tokenizer, monkeypatch, ["no", "yes"])
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), lambda line: None)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    score = next(tensor.parameter for tensor in model.tensors if tensor.name == "score.weight")
    assert torch.equal(stored["score.weight"], score) and "lm_head.weight" not in stored
