"""Checkpoint to Hugging Face folder and back, each compared by logits before the result appears."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megalowrank.checkpoint.fresh import fresh_folder
from megalowrank.checkpoint.hf.adapters import Adapter, read_adapter, write_adapter
from megalowrank.checkpoint.hf.card import write_card
from megalowrank.checkpoint.hf.check import (
    foreign_logits,
    foreign_scores,
    largest_difference,
    our_logits,
    our_scores,
    padded_probes,
    probes,
)
from megalowrank.checkpoint.hf.config import read_config
from megalowrank.checkpoint.hf.export import DTYPES, Tokens, write_json, write_model
from megalowrank.checkpoint.hf.folder import FolderWeights
from megalowrank.checkpoint.hf.names import Reader, logical_shapes
from megalowrank.checkpoint.hf.tokenizer import FILES, write_tokenizer
from megalowrank.checkpoint.plain import build_plain, load_plain, new_run, origin, save_weights
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods.full_rank import FullRank
from megalowrank.methods.lora import LoRA, LoRAConfig
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import BuiltModel
from megalowrank.models.task_head import TaskHead

Report = Callable[[str], None]
TOKENIZER = "tokenizer"  # beside an imported checkpoint: a folder
SETTINGS = "model.json"  # and a file for --config


@dataclass(frozen=True)
class Export:
    """How a model is written. ``tokenizer``: file or folder; default: the one of the run."""

    max_shard_size: str = "5GB"
    dtype: str = "float32"
    tokenizer: str | None = None
    adapters: bool = False
    without_shortcuts: bool = False


def to_hf(checkpoint: Path, out: Path, export: Export, report: Report) -> float:
    """Write ``out`` from a checkpoint or the newest of a folder; returns the largest difference of logits.

    With everything merged; or with ``export.adapters`` W as it is in ``out``/base and the factors in ``out``/adapter,
    of which transformers and PEFT make the same function. A process group of one has to exist. Raises ConfigError for
    what cannot be converted, and TrainingError if the logits differ: ``out`` is then not there.
    """
    if export.adapters:
        _require_peft()
    saved = SavedWeights.open(checkpoint, export.without_shortcuts)
    config, length = _completed(saved)
    if config.num_labels is not None and export.adapters:
        raise ConfigError("--adapters does not go with the head of a labelled task", "--adapters", "merged weights")
    frozen = _rounded(saved, DTYPES[export.dtype])
    with fresh_folder(out) as temporary:
        base = temporary / "base" if export.adapters else temporary
        base.mkdir(exist_ok=True)
        tokens = _export_tokenizer(saved, export, base, length, report)
        read = frozen if export.adapters else _merged(saved, export)
        labels = saved.run.get("labels")
        files = write_model(base, config, length, read, tokens, export.dtype, export.max_shard_size, labels)
        adapter = temporary / "adapter" if export.adapters else None
        if adapter is not None:
            adapter.mkdir()
            report(f"adapters for {write_adapter(adapter, saved, str(out / 'base'))} modules")
        expected = build_plain(config, length, lambda *it: saved.merged(it[0], frozen(*it)) if adapter else read(*it))
        saved.check_covered({tensor.name for tensor in expected.tensors})
        difference = _compared(expected, base, adapter, length, tokens["pad_token_id"])
        del expected
        _cards(base, adapter, saved, out, export, difference)
    report(f"{files} file(s) of weights in {export.dtype}; logits differ from ours by at most {difference:.3g}")
    return difference


def _compared(model: BuiltModel, base: Path, adapter: Path | None, length: int, padding: int | None) -> float:
    """The largest difference between the logits of ``model`` and of what was written; TrainingError if it matters."""
    vocabulary = model.module.vocabulary.size
    if not isinstance(model.module.output, TaskHead):
        tokens_BS = probes(vocabulary, length)
        return largest_difference(foreign_logits(base, tokens_BS, adapter), our_logits(model, tokens_BS))
    padded = padded_probes(vocabulary, length, padding or 0)
    return largest_difference(foreign_scores(base, *padded), our_scores(model, *padded))


def _completed(saved: SavedWeights) -> tuple[ModelConfig, int]:
    """Shape and longest sequence, as far as positions are learned."""
    length = int(saved.run["train"]["seq_length"])
    return completed(saved.model_config(), FAMILIES, length), length


def _rounded(saved: SavedWeights, dtype: torch.dtype) -> Reader:
    """W without its factors as it stands in the file, in float32."""
    return lambda name, shape: saved.read_frozen(name, shape).to(dtype).float()


def _merged(saved: SavedWeights, export: Export) -> Reader:
    """W with its factors, merged in float32, then rounded as it stands in the file."""
    return lambda name, shape: saved.read(name, shape).to(DTYPES[export.dtype]).float()


def _export_tokenizer(saved: SavedWeights, export: Export, folder: Path, length: int, report: Report) -> Tokens:
    source = export.tokenizer or saved.run.get("data", {}).get("tokenizer_model")
    if source is None:
        report("no tokenizer is written: the run does not name one (--tokenizer-model)")
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    padded = saved.run["model"].get("num_labels") is not None
    tokenizer, tokens = write_tokenizer(source, folder, length, padded)
    rows = int(saved.run["model"]["vocab_size"])
    if tokenizer.vocab_size() > rows:
        raise ConfigError(f"the tokenizer {source} has more tokens than the model", tokenizer.vocab_size(), rows)
    return tokens


def _cards(base: Path, adapter: Path | None, saved: SavedWeights, out: Path, export: Export, difference: float) -> None:
    found = origin(saved)
    facts = {"weights": export.dtype, "largest difference of logits to megalowrank": f"{difference:.3g}"}
    if adapter is None:
        text = "Trained with megalowrank; low-rank factors, if any, are merged into the weights in float32."
        write_card(base, out.name, found, facts, text)
        return
    text = "The frozen weights of a low-rank run of megalowrank, without its factors: those are the adapter beside it."
    write_card(base, f"{out.name}: base", found, facts, text)
    text = f"The low-rank factors of a run of megalowrank, for the model {out / 'base'}."
    write_card(adapter, f"{out.name}: adapter", found, facts, text, "peft")


def from_hf(folder: Path, out: Path, adapter: Path | None, report: Report) -> float:
    """Write a checkpoint of step 0 in ``out`` from a Hugging Face folder; returns the largest difference of logits.

    It has weights alone, for ``--load`` with ``--finetune``; beside it lie the tokenizer's files and ``model.json``,
    the shape of the model for ``--config``. With a PEFT
    ``adapter`` it is one of method lora whose factors are the adapter's. A process group of one has to exist. Raises
    ConfigError for pickles and for what our models do not compute, TrainingError if logits differ: ``out`` is then
    not there.
    """
    folder = Path(folder)
    if adapter is not None:
        _require_peft()
    config, length, notes = read_config(folder)
    weights = FolderWeights(folder, config)
    factors = None if adapter is None else read_adapter(adapter, config)
    values = _values(weights, logical_shapes(config), factors)
    with fresh_folder(out) as temporary:
        tokenizer = _copy_tokenizer(folder, temporary, out, length)
        method, method_config = FullRank.name, {}
        if factors is not None:
            method = LoRA.name
            chosen = LoRAConfig(factors.rank, factors.rank * factors.scale, lora_target=factors.targets(config))
            method_config = dataclasses.asdict(chosen)
        run = new_run(config, length, tokenizer, method, method_config)
        came = {"method": method, "updates": 0, "imported": folder.absolute().name}
        save_weights(temporary, 0, values, run, came)
        shape = {name: value for name, value in run["model"].items() if value is not None}
        write_json(temporary / SETTINGS, {"model": shape, "data": {"tokenizer_model": tokenizer}})
        values.clear()
        tokens_BS = probes(config.vocab_size or 0, length)
        ours = our_logits(load_plain(SavedWeights.open(temporary)), tokens_BS)
        difference = largest_difference(ours, foreign_logits(folder, tokens_BS, adapter))
    for note in [*notes, *([] if tokenizer else [f"no tokenizer in {folder}"])]:
        report(f"note: {note}")
    report(f"{config.model_family}, {length} positions; logits differ from transformers' by at most {difference:.3g}")
    return difference


def _values(
    weights: FolderWeights, shapes: dict[str, tuple[int, ...]], adapter: Adapter | None
) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint by their names in it."""
    factors = {} if adapter is None else adapter.factors
    found = {}
    for name, shape in shapes.items():
        matrix = name.removesuffix(".weight")
        found[f"{'weight' if matrix in factors else 'master'}/{name}"] = weights.read(name, shape)
        if matrix in factors:
            found[f"master/{matrix}.A"], found[f"master/{matrix}.B"] = factors[matrix]
    return found


def _copy_tokenizer(folder: Path, temporary: Path, out: Path, length: int) -> str | None:
    """The tokenizer's files beside the checkpoint; the path they will have, None if there are none."""
    if not any(path for pattern in FILES for path in folder.glob(pattern)):
        return None
    (temporary / TOKENIZER).mkdir()
    write_tokenizer(folder, temporary / TOKENIZER, length)
    return str(out / TOKENIZER)


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--adapters needs the package peft, to compare logits", None, "pip install peft")
