"""GoLore and GaLore in plain torch on Hugging Face's LLaMA, from full gradients: makes runs in the golden format.

Nothing of megalowrank is used. ``kind`` peft: a factor of the projected space is trained, W takes it at a refresh and
momentum is rotated; ``galore``: the optimizer projects, momentum stays. The recorded run covers one of many settings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from tests.golden.plain_relora import TARGETS, loss_of, plain_model

BETAS, EPS = (0.9, 0.999), 1e-6


class Moments:
    """Adam with ε beside √v, before the bias correction."""

    def __init__(self, like: torch.Tensor) -> None:
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def change(self, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        """What is to be subtracted."""
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient.square()
        correction = (1 - BETAS[1] ** self.t) ** 0.5 / (1 - BETAS[0] ** self.t)
        return lr * correction * self.m / (self.v.sqrt() + EPS)


class Projected:
    """One projected weight."""

    def __init__(self, weight: torch.nn.Parameter, cfg: dict[str, Any]) -> None:
        self.weight, self.cfg, self.right = weight, cfg, weight.shape[0] >= weight.shape[1]
        self.base, self.P, self.moments, self.factor = weight.detach().clone(), None, None, None

    def down(self, G: torch.Tensor) -> torch.Tensor:
        """A full matrix in the subspace."""
        return G @ self.P.t() if self.right else self.P.t() @ G

    def up(self, low: torch.Tensor) -> torch.Tensor:
        """Back to full size."""
        return low @ self.P if self.right else self.P @ low

    def refresh(self, G: torch.Tensor, source: np.random.Generator | None) -> None:
        """A new subspace: of the gradient, or random with a ``source``."""
        r, old = self.cfg["r"], self.P
        if source is not None:
            size = G.shape[1] if self.right else G.shape[0]
            Q = torch.from_numpy(np.linalg.qr(source.normal(size=(size, r)))[0])
            self.P = Q.t().contiguous() if self.right else Q
        else:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            self.P = Vh[:r] if self.right else U[:, :r]
        if self.moments is None:
            self.moments = Moments(self.down(G))
        elif self.cfg["kind"] == "peft":
            self.base = self.weight.detach().clone()
            m = self.moments.m
            self.moments.m = (m @ old) @ self.P.t() if self.right else self.P.t() @ (old @ m)
        self.factor = torch.zeros_like(self.down(G))

    def update(self, G: torch.Tensor, lr: float) -> None:
        """One step of either kind, decay after it."""
        scale, kept = self.cfg["scale"], 1 - lr * self.cfg["wd"]
        if self.cfg["kind"] == "peft":
            self.factor = (self.factor - self.moments.change(scale * self.down(G), lr)) * kept
            self.weight.data = self.base + scale * self.up(self.factor)
        else:
            self.weight.data = (self.weight.data - scale * self.up(self.moments.change(self.down(G), lr))) * kept


def clip(cfg: dict[str, Any], projected: dict[str, Projected], model: LlamaForCausalLM, refreshes: bool) -> None:
    """Scale all gradients: by the full norm where the reference has full gradients."""
    if not cfg["clip"]:
        return
    full = refreshes or cfg["kind"] == "galore"
    own = {id(p.weight): p for p in projected.values()}
    total = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        target = own.get(id(parameter))
        gradient = parameter.grad if target is None or full else cfg["scale"] * target.down(parameter.grad)
        total += gradient.square().sum()
    for parameter in model.parameters():
        parameter.grad.mul_(min(1.0, cfg["clip"] / (float(total.sqrt()) + 1e-6)))


def make_run(inputs: Path, folder: Path, name: str, **changed: Any) -> None:
    """Train and write ``name.json`` and ``name_P.npz`` beside copies of the inputs."""
    folder.mkdir(exist_ok=True)
    for file in ("tiny_llama_init.npz", "tiny_llama_data.npz"):
        shutil.copy(inputs / file, folder / file)
    cfg: dict[str, Any] = {
        "kind": "peft", "steps": 30, "gap": 8, "r": 6, "scale": 0.5, "lr": 5e-3, "rand_ratio": 2.0, "ga": 1,
        "clip": 0.0, "wd": 0.0, **changed,
    }  # fmt: skip
    model = plain_model(folder)
    projected = {
        name[len("model.") : -len(".weight")]: Projected(parameter, cfg)
        for name, parameter in model.named_parameters() if name.split(".")[-2] in TARGETS
    }  # fmt: skip
    known = {id(p.weight) for p in projected.values()}
    others = [(p, Moments(p.detach())) for p in model.parameters() if id(p) not in known]
    data, source = np.load(folder / "tiny_llama_data.npz"), np.random.default_rng(5)
    record: dict[str, Any] = {"cfg": cfg, "loss": []}
    drawn: dict[str, np.ndarray] = {}
    for u in range(cfg["steps"]):
        refreshes = u % cfg["gap"] == 0
        loss = loss_of(model, data["train"][u])
        model.zero_grad()
        loss.backward()
        record["loss"].append(float(loss.detach()))
        clip(cfg, projected, model, refreshes)
        for module, weight in projected.items():
            if refreshes:
                weight.refresh(weight.weight.grad, source if u >= cfg["rand_ratio"] * cfg["steps"] else None)
                drawn[f"P{u}/{module}"] = weight.P.numpy().copy()
            weight.update(weight.weight.grad, cfg["lr"])
        for parameter, moments in others:
            parameter.data = (parameter.data - moments.change(parameter.grad, cfg["lr"])) * (1 - cfg["lr"] * cfg["wd"])
    with torch.no_grad():
        record["val"] = float(loss_of(model, data["val"]))
    (folder / f"{name}.json").write_text(json.dumps(record))
    np.savez(folder / f"{name}_P.npz", **drawn)
