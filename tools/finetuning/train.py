"""One model on one task with one seed: full fine-tuning by transformers' Trainer, evaluated after every epoch.

AdamW as the Trainer has it (betas 0.9 and 0.999, gradients clipped to norm 1), no weight decay, no warm-up, the
learning rate falls linearly to 0. The head is drawn from the seed, which also orders the examples.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from finetuning.rows import Rows, collate
from megalowrank.data.labelled import GLUE, LabelledData
from megalowrank.data.metrics import metrics_of
from megalowrank.errors import ConfigError, TrainingError

LOSS = "loss"
Epochs = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Recipe:
    """How every model is fine-tuned; ``train_examples`` None takes all of them."""

    epochs: int = 30
    batch_size: int = 16
    lr: float = 3e-5
    max_length: int = 512
    train_examples: int | None = None
    bf16: bool = False

    def check(self) -> None:
        """ConfigError for values out of range."""
        for name, value in asdict(self).items():
            if value is not None and name != "bf16" and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} is out of range", value, "> 0")


def positions(folder: Path) -> int:
    """The longest sequence of the model in ``folder``; ConfigError if its configuration cannot be read."""
    try:
        return int(AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings)
    except Exception as error:  # transformers' validation raises several kinds
        raise ConfigError(f"{folder} is no model of transformers", " ".join(str(error).split())[:160]) from None


def measures(data: LabelledData) -> str:
    """The name under which ``metrics_of`` knows the task."""
    if data.name in GLUE:
        return data.name
    return "regression" if data.labels is None else "classification"


def finetune(folder: Path, data: LabelledData, rows: Rows, recipe: Recipe, seed: int) -> Epochs:
    """The measures and the loss after every epoch, by validation set.

    Raises TrainingError if the model ceases to give numbers.
    """
    set_seed(seed)
    model = load_classifier(folder, data, rows.padding)
    several = len(rows.validation) > 1
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        trainer = Trainer(
            model=model,
            args=_arguments(scratch, recipe, seed),
            data_collator=partial(collate, padding=rows.padding),
            train_dataset=rows.train,
            eval_dataset=rows.validation if several else next(iter(rows.validation.values())),
            compute_metrics=partial(_measured, measures(data)),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    prefixes = {name: f"eval_{name}_" if several else "eval_" for name in rows.validation}
    known = [*_measured(measures(data), (np.zeros((2, 2)), np.zeros(2))), LOSS]
    return {
        name: [
            {key: line[prefix + key] for key in known} for line in trainer.state.log_history if prefix + LOSS in line
        ]
        for name, prefix in prefixes.items()
    }


def load_classifier(folder: Path, data: LabelledData, padding: int) -> Any:
    """transformers' model for classification, float32, with a new head of as many outputs as there are classes."""
    regression = data.labels is None
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(data.labels or "1"), dtype=torch.float32, use_safetensors=True,
            local_files_only=True, trust_remote_code=False,
            problem_type="regression" if regression else "single_label_classification",
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be fine-tuned", " ".join(str(error).split())[:160]) from None
    model.config.get_text_config().pad_token_id = padding
    return model


def _arguments(scratch: str, recipe: Recipe, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch, num_train_epochs=recipe.epochs, learning_rate=recipe.lr, seed=seed,
        per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=4 * recipe.batch_size,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, optim="adamw_torch", bf16=recipe.bf16,
        eval_strategy="epoch", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def _measured(task: str, found: Any) -> dict[str, float]:
    """Measures of logits [n, classes] or values [n, 1] against labels [n]."""
    logits_NC, labels_N = found
    if not np.isfinite(logits_NC).all():
        raise TrainingError("the model gives no numbers any more: the learning rate is too high")
    regression = task in ("regression", "stsb")
    predictions = logits_NC[:, 0] if regression else logits_NC.argmax(-1)
    return metrics_of(task, predictions, labels_N)
