"""What a checkpoint holds, as JSON values."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from typing import Any

import torch

from megalowrank.checkpoint.heads import without_head
from megalowrank.checkpoint.io import Checkpoint
from megalowrank.errors import ConfigError

_CHUNK = 1 << 22  # elements in memory at a time
_FACTORS = (".A", ".B")


def facts(checkpoint: Checkpoint, verified: bool) -> dict[str, Any]:
    """The run at the moment of the checkpoint, files and tensors by kind; sizes in bytes."""
    run = checkpoint.state.get("run", {})
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        **progress(checkpoint),
        "method": run.get("method"),
        "method_config": run.get("method_config", {}),
        "model": {key: value for key, value in run.get("model", {}).items() if value is not None},
        "layout": layout(checkpoint),
        "versions": run.get("versions", {}),
        "verified": verified,
        "files": checkpoint.files,
        **kinds(checkpoint),
    }


def progress(checkpoint: Checkpoint) -> dict[str, Any]:
    """Attempted updates and the tokens they took, if the run says how many each takes."""
    attempts = checkpoint.state.get("attempts")
    train = checkpoint.state.get("run", {}).get("train", {})
    each = train.get("global_batch_size", 0) * train.get("seq_length", 0)
    return {"attempts": attempts, "tokens": attempts * each if attempts is not None and each else None}


def layout(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the ranks that wrote it divided the model."""
    run = checkpoint.state.get("run", {})
    parallel, zero = run.get("parallel", {}), run.get("deepspeed", {}).get("zero_optimization", {})
    tensor = parallel.get("tensor_model_parallel_size", 1)
    pipe = parallel.get("pipeline_model_parallel_size", 1)
    offloaded = [key for key in ("offload_optimizer", "offload_param") if zero.get(key)]
    return {
        "ranks": len(checkpoint.files),
        "tensor": tensor,
        "pipeline": pipe,
        "data": len(checkpoint.files) // (tensor * pipe),
        "zero": zero.get("stage", 0),
        "offload": offloaded,
        "bf16": run.get("train", {}).get("bf16", False),
    }


def kinds(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tensors grouped by the first part of their names, and the parameters of the model that they belong to."""
    found: dict[str, dict[str, Any]] = {}
    parameters = 0
    for name in checkpoint.names():
        kind, slash, rest = without_head(name).partition("/")
        elements, size = math.prod(checkpoint.shape(name)), checkpoint.dtype(name).itemsize
        entry = found.setdefault(kind if slash else "other", {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += elements
        entry["bytes"] += elements * size
        if kind in ("weight", "master") and not rest.endswith(_FACTORS):
            parameters += elements
    for entry in found.values():
        entry["bytes_per_parameter"] = entry["bytes"] / parameters if parameters else None
    total = sum(checkpoint.files.values())
    return {
        "parameters": parameters,
        "kinds": found,
        "bytes": total,
        "bytes_per_parameter": total / parameters if parameters else None,
    }


def matching(checkpoint: Checkpoint, pattern: str) -> list[str]:
    """The names of tensors that match a shell pattern; ConfigError if none does."""
    names = fnmatch.filter(checkpoint.names(), pattern)
    if not names:
        raise ConfigError("--tensors matches no tensor", pattern, "'master/*' or '*.mlp.*', for instance")
    return names


def chunks(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """The elements of a tensor, a few million at a time."""
    total = math.prod(checkpoint.shape(name))
    for start in range(0, total, _CHUNK):
        yield checkpoint.read(name, flat=(start, min(start + _CHUNK, total)))


def statistics(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Shape, type and values of a tensor: smallest and largest of the finite ones, 2-norm, share of zeros."""
    squares, zeros, strange, low, high = 0.0, 0, 0, math.inf, -math.inf
    for part in chunks(checkpoint, name):
        values = part.double()
        finite = values[values.isfinite()]
        strange += values.numel() - finite.numel()
        zeros += int((values == 0).sum())
        squares += float(finite.square().sum())
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    elements = math.prod(checkpoint.shape(name))
    return {
        "shape": list(checkpoint.shape(name)),
        "dtype": str(checkpoint.dtype(name)).removeprefix("torch."),
        "norm": math.sqrt(squares),
        "min": low if low <= high else None,
        "max": high if low <= high else None,
        "zeros": zeros / elements if elements else 0.0,
        "not_finite": strange,
    }
