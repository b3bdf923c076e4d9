"""ReLoRA in plain torch on Hugging Face's LLaMA, written from the algorithm: makes runs in the golden format.

Nothing of megalowrank is used. The recorded runs cover one reset and one start; these cover the others.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, RANK, BETAS = 8.0, 8, (0.9, 0.999)


class Adapted(torch.nn.Module):
    """y = x Wᵀ + s · x Aᵀ Bᵀ with W frozen."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        out, width = linear.weight.shape
        self.W = linear.weight.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.zeros(RANK, width, dtype=torch.float64))
        self.B = torch.nn.Parameter(torch.zeros(out, RANK, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.W) + ALPHA / RANK * F.linear(F.linear(x, self.A), self.B)


class Rotary(torch.nn.Module):
    """cos and sin in float64: Hugging Face's are float32, like its norms, whose rounding independent masks blow up."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        angles = position_ids[..., None].double() * inverse
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()


def multiplier(u: int, steps: int, warm: int, every: int, climb: int, floor: float) -> float:
    """The jagged cosine at 0-based update u, as a factor on the peak."""

    def cosine(t: int) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - warm) / max(1, steps - warm)))

    if u < warm:
        return u / warm
    if u >= every and u % every < climb:
        return u % every / climb * cosine(u // every * every + climb)
    return cosine(u)


def plain_model(folder: Path) -> LlamaForCausalLM:
    """The tiny LLaMA with its recorded weights, in float64 throughout."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
    )).double()  # fmt: skip
    norms = [name for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"]
    for name in norms:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.RMSNorm(64, eps=1e-6, dtype=torch.float64))
    weights = np.load(folder / "tiny_llama_init.npz")
    state = {
        ("lm_head.weight" if k == "lm_head.weight" else f"model.{k}"): torch.from_numpy(weights[k]) for k in weights
    }
    model.load_state_dict(state, strict=True)
    model.model.rotary_emb = Rotary()
    return model


def model_of(folder: Path) -> tuple[LlamaForCausalLM, dict[str, Adapted]]:
    """The same, adapted."""
    model, adapted = plain_model(folder), {}
    for name, module in list(model.model.named_modules()):
        if name.rsplit(".", 1)[-1] in TARGETS:
            adapted[name] = Adapted(module)
            parent, _, last = name.rpartition(".")
            setattr(model.model.get_submodule(parent), last, adapted[name])
    return model, adapted


def quantile_mask(values: torch.Tensor, share: float) -> torch.Tensor:
    """Where |values| is above its quantile."""
    magnitude = values.abs()
    return magnitude > torch.quantile(magnitude.flatten(), share)


def prune(optimizer: torch.optim.AdamW, factors: list[torch.Tensor], share: float, shared: bool) -> None:
    """Zero the smaller moments of each factor."""
    for factor in factors:
        state = optimizer.state[factor]
        keep = quantile_mask(state["exp_avg"], share)
        keep_sq = keep if shared else quantile_mask(state["exp_avg_sq"], share)
        state["exp_avg"].mul_(keep)
        state["exp_avg_sq"].mul_(keep_sq)


@torch.no_grad()
def merge(adapted: dict[str, Adapted], drawn: dict[str, np.ndarray], number: int, source: np.random.Generator) -> None:
    """W += s B A; A drawn anew, B = 0."""
    for name, layer in adapted.items():
        layer.W += ALPHA / RANK * layer.B @ layer.A
        layer.B.zero_()
        redraw(name, layer, drawn, number, source)


@torch.no_grad()
def redraw(name: str, layer: Adapted, drawn: dict[str, np.ndarray], number: int, source: np.random.Generator) -> None:
    """A uniform in ±1/√n, recorded under ``number``."""
    bound = layer.W.shape[1] ** -0.5
    drawn[f"A{number}/{name}"] = source.uniform(-bound, bound, tuple(layer.A.shape))
    layer.A.copy_(torch.from_numpy(drawn[f"A{number}/{name}"]))


def loss_of(model: LlamaForCausalLM, batch: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(batch).long()
    return F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_run(inputs: Path, folder: Path, name: str, *, fix_init: bool, share: float, shared: bool, steps: int) -> None:
    """Train and write ``name.json`` and ``name_A.npz`` beside copies of the inputs."""
    folder.mkdir(exist_ok=True)
    for file in ("tiny_llama_init.npz", "tiny_llama_data.npz"):
        shutil.copy(inputs / file, folder / file)
    cfg: dict[str, Any] = {
        "steps": steps, "R": 12, "r": RANK, "alpha": ALPHA, "lr": 2e-3, "warm": 4, "rwarm": 3, "wd": 0.0,
        "fix_init": fix_init, "merge": True, "reset": [not share, 0.0, share], "betas": list(BETAS), "shared": shared,
    }  # fmt: skip
    model, adapted = model_of(folder)
    drawn: dict[str, np.ndarray] = {}
    source, data = np.random.default_rng(5), np.load(folder / "tiny_llama_data.npz")
    for module, layer in adapted.items() if fix_init else ():
        redraw(module, layer, drawn, 0, source)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=BETAS, eps=1e-8, weight_decay=0.0)
    factors = [factor for layer in adapted.values() for factor in (layer.A, layer.B)]
    record: dict[str, Any] = {"cfg": cfg, "loss": [], "lr": []}
    for u in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * multiplier(u, steps, 4, 12, 3, 0.1)
        loss = loss_of(model, data["train"][u])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        record["loss"].append(float(loss.detach()))
        record["lr"].append(optimizer.param_groups[0]["lr"])
        if u + 1 > 12 and (u + 1) % 12 == 1:
            merge(adapted, drawn, u + 1, source)
            prune(optimizer, factors, share, shared) if share else reset(optimizer, factors)
    with torch.no_grad():
        record["val"] = float(loss_of(model, data["val"]))
    (folder / f"{name}.json").write_text(json.dumps(record))
    np.savez(folder / f"{name}_A.npz", **drawn)


def reset(optimizer: torch.optim.AdamW, factors: list[torch.Tensor]) -> None:
    """Zero the moments of every factor."""
    for factor in factors:
        optimizer.state[factor]["exp_avg"].zero_()
        optimizer.state[factor]["exp_avg_sq"].zero_()
