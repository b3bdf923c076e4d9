"""LoRA pre-training: W frozen, y = x Wᵀ + s · (x Aᵀ) B, factors trained like any other weight.

Paper: Hu et al. 2021, LoRA; the initialisation ``switchlora`` is eq. (3) of SwitchLoRA (Zhou et al. 2024).
Deviations: s = alpha / r with alpha 1 by default, as the SwitchLoRA experiments have it; with the
``switchlora`` initialisation s·B·A is subtracted from W in float32, after A and B are rounded to the
precision of the forward pass, so that the initial function is that of the plain model.

Bounds of the uniform distributions, for W [m, n] and rank r, gain = √(1/3):
  classic     A: 1/√n;                         B: 0
  switchlora  A: √3·(r·√m / n^1.5)^¼·√gain;    B: √3·(r / √(m·n))^¼·√gain
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megalowrank.config import above, at_least, flag
from megalowrank.lowrank.factors import LogicalMatrix, LowRankSpec
from megalowrank.lowrank.rank_table import rank_table, table_text
from megalowrank.methods.base import Adapters, Method
from megalowrank.parallel.rng import generator


@dataclass
class LoRAConfig:
    """Rank, scale, start and place of the factors."""

    lora_rank: int = flag(128, "rank r of every adapted matrix")
    lora_alpha: float = flag(1.0, "scale of the low-rank term is alpha / r")
    lora_init: str = flag("switchlora", "how the factors start", choices=("switchlora", "classic"))
    lora_target: list | None = flag(
        None, "matrices to adapt: names or shell patterns; default: every linear of the blocks", nargs="+"
    )
    lora_config: str | None = flag(
        None, "TOML file with rank, alpha and on/off of single matrices, or its text; default: all alike"
    )

    def check(self) -> None:
        """Ranges of single values; of a file of ranks the text is kept, so that run.json has it."""
        self.lora_config = table_text(self.lora_config)
        at_least("lora-rank", self.lora_rank, 1)
        above("lora-alpha", self.lora_alpha, 0.0)


def bounds(init: str, rank: int, out_features: int, in_features: int) -> tuple[float, float]:
    """(bound of A, bound of B) of the uniform start, from the logical shape."""
    m, n = out_features, in_features
    if init == "classic":
        return 1 / math.sqrt(n), 0.0
    gain = math.sqrt(math.sqrt(1 / 3))
    bound_A = math.sqrt(3) * (rank * math.sqrt(m) / n**1.5) ** 0.25 * gain
    bound_B = math.sqrt(3) * (rank / math.sqrt(m * n)) ** 0.25 * gain
    return bound_A, bound_B


def draw(bound: float, shape: tuple[int, int], *key: object) -> torch.Tensor:
    """Uniform float32 values in [-bound, bound), drawn whole and keyed by name."""
    if bound == 0:
        return torch.zeros(shape)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(*key))


class LoRA(Method):
    """Plain low-rank adapters; nothing happens between steps."""

    name = "lora"
    config_class = LoRAConfig

    def adapters(self) -> Adapters:
        rank = self.config.lora_rank
        spec, targets = LowRankSpec(rank, self.config.lora_alpha / rank), tuple(self.config.lora_target or ("*",))
        return Adapters(spec, targets, table=rank_table(self.config.lora_config))

    def initial_factors(
        self, matrix: LogicalMatrix, seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drawn(matrix, self.config.lora_init, dtype, seed)

    def drawn(
        self, matrix: LogicalMatrix, init: str, dtype: torch.dtype, seed: int, *key: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and Bᵀ [r, out] of a start called ``init``, rounded to ``dtype``; ``key`` tells draws apart."""
        bound_A, bound_B = bounds(init, matrix.rank, matrix.out_features, matrix.in_features)
        A = draw(bound_A, (matrix.rank, matrix.in_features), seed, matrix.name, "A", *key)
        Bt = draw(bound_B, (matrix.rank, matrix.out_features), seed, matrix.name, "B", *key)
        return A.to(dtype), Bt.to(dtype)
