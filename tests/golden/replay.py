"""Replay the tiny-LLaMA runs of reference implementations (format: tests/golden/data/FORMAT.md)."""

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
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.methods import METHODS, method_class
from megalowrank.methods.base import Context, Method
from megalowrank.methods.relora import ReLoRA
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_groups

MODEL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=4, vocab_size=256
)  # fmt: skip
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


SETTINGS: dict[str, Callable[[Golden], dict[str, Any]]] = {"lora": lora_settings, "relora": relora_settings}


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


def build(golden: Golden, dtype: torch.dtype) -> tuple[Method, BuiltModel]:
    """The model of a run with its recorded initial weights and factors."""
    cfg = golden.record["cfg"]
    kind = method_class(golden.family)
    method = kind(kind.config_class(**SETTINGS.get(golden.family, lambda golden: {})(golden)))
    if isinstance(method, ReLoRA):
        method.redraw = partial(recorded_draw, golden)  # type: ignore[method-assign]
    model = build_llama(MODEL, method, length=64, seed=0, dtype=dtype)
    weights = np.load(golden.folder / "tiny_llama_init.npz")
    drawn = np.load(golden.folder / f"{golden.name}_A.npz") if golden.family != "full" else {}
    for tensor in model.tensors:
        if tensor.name.endswith(".weight"):
            value = weights[reference_name(tensor.name)]
        elif tensor.name.endswith(".A") and cfg["fix_init"]:
            value = drawn["A0/" + reference_name(tensor.name)[: -len(".A")]]
        else:
            value = np.zeros(tensor.shape)
        assert value.shape == tensor.shape, tensor.name
        flat = tensor.parameter.data.view(-1)[tensor.start : tensor.start + value.size]
        flat.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(-1))
    return method, model


def optimizer_of(golden: Golden, model: BuiltModel) -> VectorClockAdamW:
    """AdamW as the run was recorded: one group, decay on everything."""
    cfg = golden.record["cfg"]
    trained = [p for p in model.module.parameters() if p.requires_grad]
    return VectorClockAdamW(trained, betas=tuple(cfg["betas"]), weight_decay=cfg["wd"])


def train(
    golden: Golden, method: Method, model: BuiltModel, engine: Engine, rank: int = 0, world: int = 1
) -> tuple[list[float], float]:
    """(training loss before every update, final validation loss)."""
    record, data = golden.record, np.load(golden.folder / "tiny_llama_data.npz")
    steps, losses = record["cfg"]["steps"], []
    ctx = Context(model.layers, engine.state, 0, steps, rank, world, host_allocator(False))
    method.start(ctx)
    for update in range(steps):
        method.before_step(update, ctx)
        batch = torch.from_numpy(data["train"][update]).long().chunk(world)[rank]
        losses.append(float(engine.train_step([batch], record["lr"][update]).loss))
    return losses, float(engine.eval_step([torch.from_numpy(data["val"]).long()]))


def dense(golden: Golden, dtype: torch.dtype) -> tuple[list[float], float]:
    """Replay without DeepSpeed."""
    method, model = build(golden, dtype)
    return train(golden, method, model, DenseEngine(model.module, model.layers, optimizer_of(golden, model), 1.0))


def through_deepspeed(payload: dict[str, Any]) -> list[tuple[list[float], float]]:
    """Replay runs in float32 at ZeRO-2 on this job's ranks."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig())
    results = []
    for name in payload["runs"]:
        golden = Golden(Path(payload["folder"]), name)
        method, model = build(golden, torch.float32)
        settings = {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 16 // groups.data_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        engine = ZeroEngine(model.module, model.layers, optimizer_of(golden, model), settings, groups)
        results.append(train(golden, method, model, engine, groups.data_rank, groups.data_size))
        engine.close()
    return results
