"""A small task, and ranks that run the program on it, case after case, each with its own flags."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megalowrank.data.tokenizers import train_tokenizer
from megalowrank.engine.setup import pretrain
from megalowrank.errors import ConfigError
from megalowrank.models.architecture import GPT_FAMILIES
from megalowrank.models.build import build_gpt, build_llama
from tests.engine.layout_cases import drop_groups

SAID = {"good": ("fine", "bright", "lovely"), "bad": ("dull", "cold", "grim")}
FILLING = ("the", "film", "story", "of", "a", "scene", "with", "actors")
SIZES = {"train": 116, "validation_a": 21, "validation_b": 5}


def make_task(folder: Path, values: bool = False) -> Path:
    """A task that one word of every text decides; with ``values`` a regression. The tokenizer lies beside it."""
    folder.mkdir()
    source = random.Random(1)
    for name, count in SIZES.items():
        lines = []
        for number in range(count):
            label = ("bad", "good")[number % 2]
            words = [*source.choices(FILLING, k=source.randint(1, 4)), source.choice(SAID[label])]
            source.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": number % 2 - 0.25 if values else label}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    words = " ".join((*FILLING, *SAID["good"], *SAID["bad"]))
    train_tokenizer([words] * 9, folder / "t.model", 335)
    return folder


def runs(payload: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The records of every case; a case is the flags beyond the ``common`` ones, and its folder."""
    found = []
    for flags in payload["cases"]:
        program = (build_gpt, "program", GPT_FAMILIES) if "--model-family" in flags else (build_llama, "program")
        with mock.patch.object(dist, "destroy_process_group"):
            pretrain([*payload["common"], *flags], *program)
        drop_groups()
        path = Path(flags[flags.index("--output-dir") + 1]) / "metrics.jsonl"
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    return found


def refusals(payload: dict[str, Any]) -> list[str]:
    """What every case is refused with, in this process; empty if it is not."""
    found = []
    for flags in payload["cases"]:
        try:
            pretrain([*payload["common"], *flags], build_llama, "program")
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found
