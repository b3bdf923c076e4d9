"""Labelled text as the token ids of a model's tokenizer, and as batches whose last real token is pooled.

transformers' models for classification read the rightmost token that is not the padding one. What fills a row is thus
an id that ends none of them: a text may end in the end-of-text token, which many a model has for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalowrank.data.labelled import Example, LabelledData
from megalowrank.data.labelled_batches import encode_examples
from megalowrank.data.tokenizers import HuggingFaceTokenizer
from megalowrank.errors import ConfigError

Row = dict[str, Any]
_PROBE = "a"


@dataclass(frozen=True)
class Rows:
    """A task for one tokenizer: rows to train on, sets to evaluate on by name, the id that fills them up.

    ``cut`` is how many texts were too long.
    """

    train: list[Row]
    validation: dict[str, list[Row]]
    padding: int
    cut: int


def encode_task(tokenizer: HuggingFaceTokenizer, data: LabelledData, length: int) -> Rows:
    """Every text in at most ``length`` tokens, with the special tokens that the tokenizer puts around a text.

    A second text follows the first after the end-of-text token. Raises ConfigError if no text fits, or if every token
    ends some text.
    """
    around = special_tokens(tokenizer)
    room = length - sum(map(len, around))
    if room < 3:
        raise ConfigError("--max-length leaves no room for a text", length, f">= {length - room + 3}")
    sets, cut = {}, 0
    for name, examples in {"train": data.train, **data.validation}.items():
        encoded, more = encode_examples(tokenizer, examples, room)
        numbers = [row[: row[room]].tolist() for row in encoded]
        sets[name], cut = [_row(ids, around, it) for ids, it in zip(numbers, examples, strict=True)], cut + more
    padding = _padding(tokenizer, [row for rows in sets.values() for row in rows])
    return Rows(sets["train"], {name: sets[name] for name in data.validation}, padding, cut)


def special_tokens(tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and after it."""
    bare, whole = tokenizer.encode(_PROBE), list(tokenizer.inner(_PROBE)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ConfigError("the tokenizer changes a text that it puts special tokens around", f"{whole} for {bare}")


def collate(rows: Sequence[Row], padding: int) -> dict[str, torch.Tensor]:
    """A batch: ``input_ids`` and ``attention_mask`` [B, T] padded on the right, ``labels`` [B]."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids_BT = torch.full((len(rows), longest), padding)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask_BT[number, : len(row["input_ids"])] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.tensor([row["labels"] for row in rows])}


def _row(ids: list[int], around: tuple[list[int], list[int]], example: Example) -> Row:
    return {"input_ids": [*around[0], *ids, *around[1]], "labels": example.label}


def _padding(tokenizer: HuggingFaceTokenizer, rows: Sequence[Row]) -> int:
    """The tokenizer's padding token or its end-of-text token, unless it ends a row; else the first that ends none."""
    ending = {row["input_ids"][-1] for row in rows}
    given = (tokenizer.inner.pad_token_id, tokenizer.inner.eos_token_id)
    choices = [number for number in (*given, *range(tokenizer.vocab_size())) if number is not None]
    chosen = next((number for number in choices if number not in ending), None)
    if chosen is None:
        raise ConfigError("every token ends some text: none is left to fill rows up", len(ending))
    return chosen
