"""The factors of a run as a PEFT adapter, one per module of the Hugging Face model, and back.

y = x Wᵀ + s·(x Aᵀ)Bᵀ is PEFT's LoRA with lora_alpha / r = s. Where their module fuses Q, K and V, the three adapters
of rank r are one of rank 3r: A on top of each other, B in blocks of zeros elsewhere. The other way, an adapter of
rank r on a fused module is the same A for each of Q, K and V with a part of B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.hf.export import write_json, write_safetensors
from megalowrank.checkpoint.hf.folder import SafetensorsFiles, safetensors_files
from megalowrank.checkpoint.hf.names import Stored, names_of, stored_tensors
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # logical matrix -> A [r, in], Bᵀ [r, out]
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False,), "use_dora": (False,),
    "modules_to_save": (None, []), "trainable_token_indices": (None,), "lora_bias": (False,),
    "megatron_config": (None,), "layer_replication": (None,), "target_parameters": (None, []), "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
}  # fmt: skip


def write_adapter(folder: Path, saved: SavedWeights, base: str) -> int:
    """Write adapter_model.safetensors and adapter_config.json for the model at ``base``; returns how many modules.

    Raises ConfigError if the run has no factors, or some that an adapter cannot express.
    """
    config = saved.model_config()
    if saved.adapters is None:
        raise ConfigError("--adapters needs a run with low-rank factors", f"--method {saved.run['method']}")
    if saved.adapters.spec.snapshot:
        method = f"--method {saved.run['method']}"
        raise ConfigError("--adapters would lose the snapshots that are subtracted", method, "merged weights")
    values: dict[str, torch.Tensor] = {}
    found: dict[str, tuple[int, float]] = {}
    for module in _modules(config):
        matrices = [part.removesuffix(".weight") for part in module.parts]
        scale = next((saved.scale(name) for name in matrices if saved.factors(name) is not None), None)
        if scale is None:
            continue
        A, B = _fuse(saved, matrices, module, scale)
        path = module.name.removesuffix(".weight")
        values[f"base_model.model.{path}.lora_A.weight"] = A
        values[f"base_model.model.{path}.lora_B.weight"] = B
        found[path] = len(A), scale * len(A)
    write_safetensors(folder / "adapter_model.safetensors", values)
    write_json(folder / "adapter_config.json", _config(config, found, saved, base))
    return len(found)


def _modules(config: ModelConfig) -> Iterator[Stored]:
    """The weights of their linears in blocks."""
    blocks = names_of(config).blocks
    return (stored for stored in stored_tensors(config) if stored.name.startswith(blocks) and len(stored.shape) == 2)


def _fuse(
    saved: SavedWeights, matrices: Sequence[str], module: Stored, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, in] and B [out, R] of a module that fuses matrices, R the sum of their ranks, for one common scale."""
    factors = {name: pair for name in matrices if (pair := saved.factors(name)) is not None}
    A = torch.cat([A for A, _ in factors.values()])
    first, blocks = 0, []
    for name, part in zip(matrices, module.shapes, strict=True):
        block = A.new_zeros(part[0], len(A))
        if name in factors:
            Bt = factors[name][1]
            block[:, first : first + len(Bt)] = Bt.t() * (saved.scale(name) / scale)
            first += len(Bt)
        blocks.append(block)
    return A.contiguous(), _rows(module).join(blocks)


def _rows(module: Stored) -> Stored:
    """The module's order of rows, for tensors [out, any]."""
    return Stored(module.name, module.parts, module.shapes, module.heads)


def _config(config: ModelConfig, found: dict[str, tuple[int, float]], saved: SavedWeights, base: str) -> dict[str, Any]:
    """``found``: rank and alpha by module."""
    assert saved.adapters is not None
    spec, names = saved.adapters.spec, names_of(config)
    short = {path: _short(path, list(names.block.values())) for path in names.block.values()}
    layers = config.num_layers or 0
    inner = {path.removeprefix(f"{names.blocks}.").partition(".")[2] for path in found}
    targets = sorted(short[path] for path in inner) if len(found) == layers * len(inner) else sorted(found)
    other = _others(found, (spec.rank, spec.scale * spec.rank))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": spec.rank,
        "lora_alpha": spec.scale * spec.rank, "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": names.transposed, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
        "rank_pattern": {name: rank for name, (rank, _) in other.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in other.items()},
    }  # fmt: skip


def _others(found: dict[str, tuple[int, float]], usual: tuple[int, float]) -> dict[str, tuple[int, float]]:
    """The modules that are not as ``usual``, by their last word where all of that name are alike."""
    by_word: dict[str, set[tuple[int, float]]] = {}
    for path, values in found.items():
        by_word.setdefault(path.rsplit(".", 1)[-1], set()).add(values)
    chosen = {}
    for path, values in found.items():
        word = path.rsplit(".", 1)[-1]
        if values != usual:
            chosen[word if len(by_word[word]) == 1 else path] = values
    return chosen


def _short(path: str, paths: list[str]) -> str:
    """The last word of a path within a block, or all of it where others end alike."""
    last = path.rsplit(".", 1)[-1]
    return path if sum(other.rsplit(".", 1)[-1] == last for other in paths) > 1 else last


@dataclass(frozen=True)
class Adapter:
    """An adapter of theirs: factors by logical matrix, all of ``rank``, and s of s·B·A."""

    factors: Factors
    rank: int
    scale: float

    def targets(self, config: ModelConfig) -> list[str]:
        """The matrices as ``--lora-target`` names them."""
        parts = sorted({name.rsplit(".", 1)[-1] for name in self.factors})
        return parts if len(self.factors) == len(parts) * (config.num_layers or 0) else sorted(self.factors)


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Read a PEFT folder for a model of this shape.

    Raises ConfigError for pickles, for adapters that are no plain LoRA of the linears in blocks, and for several
    ranks or scales.
    """
    settings = _settings(folder / "adapter_config.json")
    files = SafetensorsFiles(safetensors_files(folder, "adapter_model"))
    paths: dict[str, dict[str, str]] = {}
    for key in sorted(files.names()):
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(f"{folder} has a tensor that is no LoRA factor", key)
        paths.setdefault(match[1], {})[match[2]] = key
    modules = {module.name.removesuffix(".weight"): module for module in _modules(config)}
    factors: Factors = {}
    scales: set[float] = set()
    for path, keys in paths.items():
        if path not in modules or keys.keys() != {"A", "B"}:
            raise ConfigError(f"{folder} adapts something that is no linear of a block", path)
        rank = _pattern(settings, "rank_pattern", path, settings["r"])
        scales.add(_pattern(settings, "alpha_pattern", path, settings["lora_alpha"]) / rank)
        factors.update(_split(files, keys, modules[path], rank))
    ranks = {len(A) for A, _ in factors.values()}
    if len(ranks) != 1 or len(scales) != 1:
        raise ConfigError(
            f"{folder} has factors of several ranks or scales", f"{sorted(ranks)}, {sorted(scales)}", "one of each"
        )
    return Adapter(factors, ranks.pop(), scales.pop())


def _split(files: SafetensorsFiles, keys: dict[str, str], module: Stored, rank: int) -> Factors:
    """Factors of every matrix that a module fuses: blocks if B has them, else the same A for each."""
    out, into = (module.shape[::-1] if module.transposed else module.shape)[:2]
    A, B = files.read(keys["A"], (rank, into)), files.read(keys["B"], (out, rank))
    names = [part.removesuffix(".weight") for part in module.parts]
    parts = _rows(module).split(B)
    own, left = divmod(rank, len(parts))
    blocks = [slice(number * own, (number + 1) * own) for number in range(len(parts))]
    if left or any(_outside(part, block) for part, block in zip(parts, blocks, strict=True)):
        return {name: (A, part.t().contiguous()) for name, part in zip(names, parts, strict=True)}
    found = zip(names, parts, blocks, strict=True)
    return {name: (A[block].contiguous(), part[:, block].t().contiguous()) for name, part, block in found}


def _outside(part: torch.Tensor, block: slice) -> bool:
    """Whether B [out, r] has anything outside these columns."""
    return bool(part[:, : block.start].any() or part[:, block.stop :].any())


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["r"], found["lora_alpha"] = int(found["r"]), float(found["lora_alpha"])
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", None, "a folder of save_pretrained") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not the configuration of an adapter", repr(error)[:100]) from None
    for name, allowed in _PLAIN.items():
        if found.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{name} in {path} is something our factors do not compute", found[name], allowed[0])
    return found


def _pattern(settings: dict[str, Any], name: str, path: str, default: Any) -> Any:
    """A value for this module, as PEFT looks it up."""
    for key, value in (settings.get(name) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
