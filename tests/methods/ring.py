"""An independent SwitchLoRA in numpy, and the product's on dense state with given gradients.

``Ring`` is written from sections 3 to 5 of the method's description: rings of C slots, the slot that every
position holds, and a counter of frozen steps per position. The product has none of these: it has a FIFO of the
spare vectors, one pointer, and the counts of the last steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.methods.base import Context
from megalowrank.methods.switchlora import SwitchLoRA, SwitchLoRAConfig

STEPS, LR, SEED = 60, 1e-2, 5


def rate_of(kind: str, t: int, descent: float) -> float:
    if kind == "constant":
        return 1.0
    if kind == "sigmoid":
        return 1 / (1 + np.exp(10 / descent * (t - descent)))
    return max(0.3 ** ((t + 1) / descent), 1e-8)


class Ring:
    """One matrix: W [m, n], A [r, n], B as rows [r, m], two rings of C slots, Adam per vector; float64."""

    def __init__(self, W: Any, A: Any, B: Any, spare_A: Any, spare_B: Any, scale: float, freeze: int) -> None:
        self.W, self.scale, self.freeze = W, scale, freeze
        self.r, self.C = len(A), min(W.shape)
        self.vectors = {"A": A, "B": B}
        self.ring = {"A": np.concatenate((spare_A, A)), "B": np.concatenate((spare_B, np.roll(B, -(self.r // 2), 0)))}
        first = self.C - self.r
        held_B = [first + (i - self.r // 2) % self.r for i in range(self.r)]
        self.slot = {"A": [first + i for i in range(self.r)], "B": held_B}
        self.pointer = {"A": 0, "B": self.r // 2}
        self.fixed = {"A": np.zeros(self.r, int), "B": np.zeros(self.r, int)}
        self.adam = {k: [np.zeros_like(v), np.zeros_like(v), np.zeros(self.r, int)] for k, v in self.vectors.items()}
        self.frozen_now: dict[str, set[int]] = {"A": set(), "B": set()}
        self.most = 0

    def count(self, expected: float, draw: float) -> int:
        if self.r >= self.C:
            return 0
        k = int(expected) + int(draw < expected - int(expected))
        a, b = self.pointer["A"], self.pointer["B"]
        frozen = {kind: int((self.fixed[kind] > 0).sum()) for kind in "AB"}
        return min(k, (a - frozen["A"] - b) % self.r, (b - frozen["B"] - a) % self.r)

    def switch(self, kind: str, k: int) -> None:
        other = "B" if kind == "A" else "A"
        for _ in range(k):
            p = self.pointer[kind]
            taken = (self.slot[kind][p - 1] + 1) % self.C
            old, new = self.vectors[kind][p].copy(), self.ring[kind][taken].copy()
            left, right = (self.vectors["B"][p], old - new) if kind == "A" else (old - new, self.vectors["A"][p])
            self.W += self.scale * np.outer(left, right)
            self.ring[kind][self.slot[kind][p]] = old
            self.slot[kind][p], self.vectors[kind][p] = taken, new
            self.fixed[other][p] = self.freeze or -1
            self.pointer[kind] = (p + 1) % self.r

    def step(self, expected: float, draw: float, gradients: dict[str, Any]) -> int:
        k = self.count(expected, draw)
        self.most = max(self.most, k)
        self.switch("A", k)
        self.switch("B", k)
        for kind in "AB":
            fixed, gradient = self.fixed[kind], gradients[kind].copy()
            m, v, clock = self.adam[kind]
            for state in (m, v, clock):
                state[(fixed == self.freeze) & (fixed > 0) | (fixed < 0)] = 0
            fixed[fixed < 0] = 0
            gradient[fixed > 0] = 0
            self.frozen_now[kind] = set(np.flatnonzero(fixed > 0).tolist())
            fixed[fixed > 0] -= 1
            clock += 1
            m[:] = 0.9 * m + 0.1 * gradient
            v[:] = 0.999 * v + 0.001 * gradient**2
            first, second = (1 - beta ** clock[:, None].astype(float) for beta in (0.9, 0.999))
            self.vectors[kind] -= LR / first * m / (np.sqrt(v / second) + 1e-8)
        return k

    def queue(self, kind: str) -> np.ndarray:
        """The spare vectors, the next one first."""
        last = self.slot[kind][self.pointer[kind] - 1]
        return self.ring[kind][[(last + 1 + i) % self.C for i in range(self.C - self.r)]]


# ---------------------------------------------------------------- the product on dense state


class Linear(torch.nn.Module):
    """Factors with given gradients: ``forward(step)`` is Σ A · g_A + B · g_B, with fresh random g."""

    def __init__(self, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers: list[LowRankFactors] = []
        for j, (m, n, r) in enumerate(shapes):
            weight = torch.nn.Parameter(torch.randn(m, n, dtype=dtype), requires_grad=False)
            A, Bt = (torch.nn.Parameter(torch.zeros(r, size, dtype=dtype)) for size in (n, m))
            for name, parameter in (("W", weight), ("A", A), ("B", Bt)):
                self.register_parameter(f"{name}_{j}", parameter)
            self.layers.append(LowRankFactors(f"matrix.{j}", A, Bt, FoldedWeight(weight), 0, 0.7))
            self.layers[-1].index = j
        self.gradients: list[dict[str, torch.Tensor]] = []

    def forward(self, gradients: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        pairs = zip(self.layers, gradients, strict=True)
        return sum(((layer.A * g["A"]).sum() + (layer.Bt * g["B"]).sum() for layer, g in pairs), torch.zeros(()))

    def draw(self, source: torch.Generator) -> list[dict[str, torch.Tensor]]:
        return [
            {"A": torch.randn(layer.A.shape, dtype=layer.A.dtype, generator=source),
             "B": torch.randn(layer.Bt.shape, dtype=layer.A.dtype, generator=source)}
            for layer in self.layers
        ]  # fmt: skip


@torch.no_grad()
def start_factors(method: SwitchLoRA, layers: list[LowRankFactors], seed: int, dtype: torch.dtype) -> None:
    """Set the factors of ``layers`` to their start and take their product out of W."""
    for layer in layers:
        A, Bt = method.initial_factors(layer, seed, dtype)
        layer.A.copy_(A)
        layer.Bt.copy_(Bt)
        layer.fold(-layer.Bt, layer.A)


@dataclass
class Trial:
    """One random setting and everything built for it."""

    module: Linear
    method: SwitchLoRA
    engine: DenseEngine
    ctx: Context
    config: SwitchLoRAConfig

    @classmethod
    def build(cls, number: int, dtype: torch.dtype, shapes: list[tuple[int, int, int]] | None = None,
              rank: int = 0, world: int = 1, **flags: Any) -> Trial:  # fmt: skip
        torch.manual_seed(number)
        config = SwitchLoRAConfig(**flags)
        config.check()
        module, method = Linear(shapes or [(9, 7, 3)], dtype), SwitchLoRA(config)
        start_factors(method, module.layers, SEED + number, dtype)
        parameters = [p for p in module.parameters() if p.requires_grad]
        engine = DenseEngine(module, module.layers, VectorClockAdamW(parameters), 0.0)
        ctx = Context(module.layers, engine.state, SEED + number, STEPS, rank, world, host)
        method.start(ctx)
        return cls(module, method, engine, ctx, config)

    def pool(self, factor: int) -> np.ndarray:
        return self.method.pools.local(factor).double().numpy().copy()

    def rings(self) -> list[Ring]:
        return [
            Ring(*(numpy(t) for t in (layer.weight.parameter, layer.A, layer.Bt)), self.pool(2 * j),
                 self.pool(2 * j + 1), layer.scale, self.config.switch_freeze_steps)
            for j, layer in enumerate(self.module.layers)
        ]  # fmt: skip


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def host(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(numel, dtype=dtype)
