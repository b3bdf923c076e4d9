"""Replay the tiny-LLaMA runs of reference implementations (format: tests/golden/data/FORMAT.md).

On one process, or on ranks that divide the model by layer width (``tp``), by layer (``pp``) and by data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalowrank.config import ModelConfig, ParallelConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.partial import NormOverRanks
from megalowrank.engine.pipeline import PipelineEngine
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.lowrank.factors import LowRankFactors, factor_places
from megalowrank.lowrank.state import Spread
from megalowrank.methods import METHODS, method_class
from megalowrank.methods.base import Context, Method
from megalowrank.methods.golore import GoLore
from megalowrank.methods.lte import LTE
from megalowrank.methods.relora import ReLoRA
from megalowrank.models.architecture import LLAMA_FAMILIES, completed
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.models.stages import split_layers
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, initialize_groups
from tests.golden import replay_golore, replay_lte

MODEL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=4, vocab_size=256
)  # fmt: skip
Replayed = tuple[list[float], float]
PARTS = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


@dataclass(frozen=True)
class Golden:
    """One recorded run: its JSON and, for low-rank families, the drawn factors."""

    folder: Path
    name: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @property
    def family(self) -> str:
        """The name of the method that the run needs, built or not."""
        cfg = self.record["cfg"]
        if "heads" in cfg:
            return "lte"
        if "kind" in cfg:
            return "galore" if cfg["kind"] == "galore" else "golore"
        if not (self.folder / f"{self.name}_A.npz").exists():
            return "full"
        return "relora" if cfg["merge"] else "lora"

    @property
    def clip(self) -> float:
        """The largest gradient norm; 0 clips nothing."""
        return 0.0 if self.family == "lte" else self.record["cfg"].get("clip", 1.0)

    @property
    def built(self) -> bool:
        return self.family in METHODS


def lora_settings(golden: Golden) -> dict[str, Any]:
    """Flags of a LoRA run."""
    cfg = golden.record["cfg"]
    return {"lora_rank": cfg["r"], "lora_alpha": cfg["alpha"], "lora_init": "classic"}


def relora_settings(golden: Golden) -> dict[str, Any]:
    """Flags of a ReLoRA run; masks are the reference's independent ones unless the record says otherwise."""
    cfg = golden.record["cfg"]
    reset, random, magnitude = cfg["reset"]
    assert not random, f"{golden.name}: the draws of random pruning are not recorded"
    how = "magnitude" if magnitude else "zero" if reset else "none"
    return {
        **lora_settings(golden),
        "lora_init": "classic" if cfg["fix_init"] else "zero",
        "relora_interval": cfg["R"],
        "relora_reset": how,
        "relora_prune_ratio": magnitude or None,
        "relora_masks": "shared" if not magnitude or cfg.get("shared") or "shared" in golden.name else "independent",
    }


def golore_settings(golden: Golden) -> dict[str, Any]:
    """Flags of a GoLore or GaLore run."""
    return replay_golore.settings(golden.record["cfg"])


SETTINGS: dict[str, Callable[[Golden], dict[str, Any]]] = {
    "lora": lora_settings, "relora": relora_settings, "golore": golore_settings, "galore": golore_settings,
    "lte": lambda golden: replay_lte.settings(golden.record["cfg"]),
}  # fmt: skip


def recorded_draw(golden: Golden, layer: LowRankFactors, step: int, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """A and Bᵀ after a merge as the reference drew them."""
    drawn = np.load(golden.folder / f"{golden.name}_A.npz")
    A = torch.from_numpy(drawn[f"A{step}/" + reference_name(f"{layer.name}.weight")[: -len(".weight")]])
    return A.to(ctx.state.forward.dtype), torch.zeros(layer.rank, layer.out_features, dtype=ctx.state.forward.dtype)


def found_in(folder: Path) -> list[Golden]:
    """Every run in a folder."""
    return [Golden(folder, path.stem) for path in sorted(folder.glob("*.json"))]


def reference_name(name: str) -> str:
    """The Hugging Face name of a logical tensor."""
    renamed = name.replace(".attention.", ".self_attn.").replace("pre_mlp_layernorm", "post_attention_layernorm")
    for part, letters in PARTS.items():
        for letter in letters:
            renamed = renamed.replace(f"{part}.{letter}.", f"{part}.{letter}_proj.")
    return {"embedding.weight": "embed_tokens.weight", "output.weight": "lm_head.weight"}.get(renamed, renamed)


def build(
    golden: Golden, dtype: torch.dtype, groups: Groups | None = None, head: int | None = None
) -> tuple[Method, BuiltModel]:
    """The model of a run, or this rank's part of it, with its recorded initial weights and factors.

    ``head``: that of LTE's heads which is alone on this rank.
    """
    cfg = golden.record["cfg"]
    kind = method_class(golden.family)
    flags = SETTINGS.get(golden.family, lambda golden: {})(golden)
    method = kind(kind.config_class(**(flags if head is None else replay_lte.settings(cfg, apart=True))))
    method.head = head or 0
    if isinstance(method, ReLoRA):
        method.redraw = partial(recorded_draw, golden)  # type: ignore[method-assign]
    if isinstance(method, GoLore):
        projectors = np.load(golden.folder / f"{golden.name}_P.npz")
        replay_golore.inject(method, projectors, lambda name: reference_name(f"{name}.weight")[: -len(".weight")])
    place = None if groups is None else placement(method, groups)
    model = build_llama(MODEL, method, length=64, seed=0, dtype=dtype, place=place)
    weights = np.load(golden.folder / "tiny_llama_init.npz")
    drawn = np.load(golden.folder / f"{golden.name}_A.npz") if golden.family in ("lora", "relora") else {}
    for tensor in model.tensors:
        if tensor.name.endswith(".weight"):
            value = weights[reference_name(tensor.name)]
        elif tensor.name.endswith(".A") and cfg.get("fix_init"):
            value = drawn["A0/" + reference_name(tensor.name)[: -len(".A")]]
        else:
            value = np.zeros(tensor.shape)
        assert value.shape == tensor.shape, tensor.name
        tensor.fill(torch.from_numpy(value))
    if isinstance(method, LTE):
        replay_lte.adapt_output(method, model)
        factors = dict(np.load(golden.folder / f"{golden.name}_A.npz"))
        replay_lte.fill(method, model, factors, lambda name: reference_name(f"{name}.weight")[: -len(".weight")])
    return method, model


def placement(method: Method, groups: Groups) -> Placement:
    """The part of the model on this rank."""
    config, last = completed(MODEL, LLAMA_FAMILIES, 64), groups.pipe_size - 1
    blocks = split_layers(config, method.adapters(), groups.pipe_size)[groups.pipe_rank]
    return Placement(groups.wire(), blocks, groups.pipe_rank == 0, groups.pipe_rank == last)


def optimizer_of(golden: Golden, model: BuiltModel) -> VectorClockAdamW:
    """AdamW as the run was recorded: one group, decay on everything."""
    cfg = golden.record["cfg"]
    if "kind" in cfg:
        return replay_golore.optimizer_of(cfg, model)
    if "heads" in cfg:
        return replay_lte.optimizer_of(cfg, model)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    return VectorClockAdamW(trained, betas=tuple(cfg["betas"]), weight_decay=cfg["wd"])


def train(
    golden: Golden, method: Method, model: BuiltModel, engine: Engine, groups: Groups | None = None, updates: int = 0
) -> Replayed:
    """(training loss before every update, final validation loss); ``updates`` above 0 stops there."""
    record, data = golden.record, np.load(golden.folder / "tiny_llama_data.npz")
    rank, world = (groups.data_rank, groups.data_size) if groups else (0, 1)
    cfg = record["cfg"]
    ctx = Context(model.layers, engine.state, 0, cfg["steps"], rank, world, host_allocator(False), engine=engine)
    method.start(ctx)
    rates = record.get("lr", [cfg["lr"]] * cfg["steps"])
    conventions = replay_golore.Conventions(cfg, model, engine) if "kind" in cfg else None
    losses, rows = [], 16 // world // passes(groups)
    for update in range(updates or cfg["steps"]):
        batch = torch.from_numpy(data["train"][update]).long().chunk(world)[rank]
        ctx.micro_batches = batch.split(rows // cfg.get("ga", 1) if groups is None else rows)
        method.before_step(update, ctx)
        if conventions:
            conventions.before(update, ctx)
        losses.append(float(engine.train_step(ctx.micro_batches, rates[update]).loss))
        if conventions:
            conventions.after(rates[update])
    method.settle(ctx)
    return losses, float(engine.eval_step(torch.from_numpy(data["val"]).long().split(rows)))


def passes(groups: Groups | None) -> int:
    """Micro-batches of an update: enough to keep the stages of a pipeline busy."""
    return 1 if groups is None else 2 * groups.pipe_size if groups.pipe_size > 1 else 1


def dense(golden: Golden, dtype: torch.dtype) -> Replayed:
    """Replay without DeepSpeed."""
    method, model = build(golden, dtype)
    engine = DenseEngine(model.module, model.layers, optimizer_of(golden, model), golden.clip)
    return train(golden, method, model, engine)


def divided(payload: dict[str, Any]) -> list[Replayed]:
    """Replay runs on this job's ranks: in float64 by tensor parallelism alone, else in float32 through DeepSpeed.

    ``payload``: ``folder``, ``runs``, ``tp``, ``pp``, ``updates`` (0: all), and ``stage`` of ZeRO or None for float64.
    """
    initialize_distributed(None)
    sizes = ParallelConfig(tensor_model_parallel_size=payload["tp"], pipeline_model_parallel_size=payload["pp"])
    groups, stage, results = initialize_groups(sizes), payload["stage"], []
    for name in payload["runs"]:
        golden = Golden(Path(payload["folder"]), name)
        method, model = build(golden, torch.float64 if stage is None else torch.float32, groups)
        make = exact_engine if stage is None else partial(zero_engine, stage=stage)
        engine = make(model, optimizer_of(golden, model), groups, golden.clip)
        results.append(train(golden, method, model, engine, groups, payload["updates"]))
        if stage is not None:
            engine.close()
    return results


def exact_engine(model: BuiltModel, optimizer: VectorClockAdamW, groups: Groups, clip: float) -> DenseEngine:
    """An engine in float64, which DeepSpeed does not have."""
    assert groups.data_size == groups.pipe_size == 1
    spread = Spread(factor_places(model.layers, groups.tensor_rank), groups.tensor)
    engine = DenseEngine(model.module, model.layers, optimizer, clip, spread)
    optimizer.norm_over = NormOverRanks(groups.tensor)
    return engine


def zero_engine(
    model: BuiltModel, optimizer: VectorClockAdamW, groups: Groups, clip: float, *, stage: int
) -> ZeroEngine | PipelineEngine:
    """The engine of a training run."""
    settings = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 16 // groups.data_size // passes(groups),
        "gradient_accumulation_steps": passes(groups),
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if groups.pipe_size > 1:
        return PipelineEngine(model.module, model.layers, optimizer, settings, groups, tied=False)
    return ZeroEngine(model.module, model.layers, optimizer, settings, groups)
