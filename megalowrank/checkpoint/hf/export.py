"""A Hugging Face folder of a model: safetensors in files of a bounded size, config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig

from megalowrank.checkpoint.folder import write_text
from megalowrank.checkpoint.hf.config import to_foreign
from megalowrank.checkpoint.hf.names import Reader, stored_tensors
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Tokens = dict[str, int | None]


def write_model(
    folder: Path,
    config: ModelConfig,
    length: int,
    read: Reader,
    tokens: Tokens,
    dtype: str,
    max_shard_size: str,
    labels: Sequence[str] | None = None,
) -> int:
    """Write the model whose logical tensors ``read`` gives; returns how many files hold its weights.

    ``length`` is the longest sequence, ``tokens`` has ``bos_token_id`` and the like, ``labels`` are the names of the
    classes of a labelled task. One file's tensors are in memory at a time. Raises ConfigError for a model that theirs
    cannot express and for a malformed size.
    """
    to_foreign(config, length, tokens, dtype, labels).save_pretrained(folder)
    if config.num_labels is None:
        GenerationConfig(**tokens).save_pretrained(folder)
    plan = _plan(config, DTYPES[dtype], max_shard_size)
    stored = {tensor.name: tensor for tensor in stored_tensors(config)}
    for file, names in plan.filename_to_tensors.items():
        values: dict[str, torch.Tensor] = {}
        for tensor in (stored[name] for name in names):
            parts = [read(*part) for part in zip(tensor.parts, tensor.shapes, strict=True)]
            values[tensor.name] = tensor.join(parts).to(DTYPES[dtype])
        write_safetensors(folder / file, values)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return len(plan.filename_to_tensors)


def _plan(config: ModelConfig, dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    shapes = {tensor.name: torch.empty(tensor.shape, dtype=dtype, device="meta") for tensor in stored_tensors(config)}
    try:
        return split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError("--max-shard-size is malformed", f"{max_shard_size}: {error}", "like 5GB") from None


def write_safetensors(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Write one file as transformers marks its own."""
    save_file(values, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable by its owner alone


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
