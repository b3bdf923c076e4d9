"""The head of a labelled task against transformers' models for sequences: logits, losses, gradients, padding."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2ForSequenceClassification,
    GPTNeoXForSequenceClassification,
    LlamaForSequenceClassification,
    OPTForSequenceClassification,
    PreTrainedModel,
)

from megalowrank.config import ModelConfig
from megalowrank.methods.full_rank import FullRank, FullRankConfig
from megalowrank.models.accounting.activations import kept_by_micro_batch
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.parameters import count_parameters
from megalowrank.models.accounting.parts import rank_parts
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.models.task_head import task_loss
from megalowrank.parallel.groups import initialize_single_process
from tests.models.hugging_face import FACTORIES, effective_weights, logical, theirs
from tests.models.kept import Kept
from tests.models.test_gpt import CONFIGS, LENGTH, WORDS, disturb

THEIRS = {
    "llama": LlamaForSequenceClassification, "gpt2": GPT2ForSequenceClassification,
    "neox": GPTNeoXForSequenceClassification, "opt": OPTForSequenceClassification,
}  # fmt: skip
PAD = WORDS - 1


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def labelled(family: str, labels: int) -> ModelConfig:
    """A model that would have a tied head, if it had one of the vocabulary."""
    return completed(replace(CONFIGS[family], num_labels=labels, tie_word_embeddings=True), FAMILIES, LENGTH)


def build(config: ModelConfig) -> BuiltModel:
    model = build_model(config, FullRank(FullRankConfig()), length=LENGTH, seed=1, dtype=torch.float64)
    disturb(model)
    return model


def reference(config: ModelConfig, model: BuiltModel) -> PreTrainedModel:
    """transformers' own, in float64, with our weights."""
    family = config.model_family or ""
    causal = FACTORIES[family](replace(config, tie_word_embeddings=True), torch.float64)
    causal.config.update({"num_labels": config.num_labels, "pad_token_id": PAD})
    found = THEIRS[family](causal.config).double().eval()
    found.set_submodule(found.base_model_prefix, getattr(causal, causal.base_model_prefix))
    weights = effective_weights(model)
    score = weights.pop("score.weight")
    named = {name: value for name, value in theirs(config, weights).items() if name != "lm_head.weight"}
    found.load_state_dict({**named, "score.weight": score}, strict=True)
    return found


def batch(labels: int, padding: int = PAD) -> torch.Tensor:
    """Rows of 1 to LENGTH tokens, the padding, the length and the label."""
    source = torch.Generator().manual_seed(4)
    lengths = torch.tensor([LENGTH, 1, 7, 12, LENGTH - 1])
    tokens = torch.randint(0, PAD, (5, LENGTH), generator=source)
    tokens[torch.arange(LENGTH)[None] >= lengths[:, None]] = padding
    targets = torch.tensor([1, 0, 2, 1, 1]) % labels if labels > 1 else torch.tensor([1, -2, 3, 0, 5]) * 500_000
    return torch.cat((tokens, torch.stack((lengths, targets), dim=1)), dim=1)


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("family", THEIRS)
def test_logits_loss_and_gradients_are_those_of_transformers(family: str, labels: int) -> None:
    config = labelled(family, labels)
    model, rows = build(config), batch(labels)
    other, tokens, lengths = reference(config, model), rows[:, :LENGTH], rows[:, LENGTH]
    mask = torch.arange(LENGTH)[None] < lengths[:, None]
    targets = rows[:, -1] if labels > 1 else rows[:, -1].double() / 1e6
    expected = other(tokens, attention_mask=mask.long(), labels=targets)
    logits = model.module.output.last(model.module.logits(tokens), lengths)
    assert logits.shape == (5, labels) and expected.logits.std() > 0.05
    assert (logits - expected.logits).abs().max() <= 1e-7
    loss = model.module(rows)
    assert float(loss) == pytest.approx(float(expected.loss), abs=1e-7)
    loss.backward()
    expected.loss.backward()
    gradients = logical(model, gradients=True)
    assert "output.weight" not in gradients, "nothing of the vocabulary's head is left"
    score = gradients.pop("score.weight")
    found = {**theirs(config, gradients), "score.weight": score}
    for key, parameter in other.named_parameters():
        assert (found[key] - parameter.grad).abs().max() <= 1e-8, key


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """Bit by bit, whatever it is: no token sees what follows it."""
    model = build(labelled("llama", 3))
    losses = {float(model.module(batch(3, padding))) for padding in (PAD, 0, 17)}
    assert len(losses) == 1
    head = model.module.output
    head.kept = []
    model.module(batch(3))
    assert head.kept[0].shape == (5, 3)
    assert float(task_loss(head.kept[0], batch(3)[:, -1])) == losses.pop()


@pytest.mark.parametrize("family", THEIRS)
def test_what_is_planned_of_it_is_what_there_is(family: str) -> None:
    """Parameters of the model, and the bytes that a forward pass keeps, in float32."""
    config = labelled(family, 3)
    model = build_model(config, FullRank(FullRankConfig()), length=LENGTH, seed=1)
    layout = Layout(None, False, micro_batch=5, seq_length=LENGTH, accelerator=False)
    parameters = list(model.module.parameters())
    held = sum(parameter.numel() for parameter in parameters)
    assert held == sum(part.numel for part in rank_parts(config, None, layout)) == count_parameters(config, None).total
    angles = [] if model.module.angles is None else [model.module.angles]
    model.module.train()
    with Kept([*parameters, *angles]) as kept:
        model.module(batch(3))
    expected = kept_by_micro_batch(config, None, layout)
    assert kept.nbytes == expected.begin + sum(expected.blocks) + expected.end
