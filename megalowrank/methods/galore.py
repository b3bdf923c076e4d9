"""GaLore: GoLore's subspaces by SVD throughout, and momentum that is kept as it is when the subspace changes.

Paper: Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (alg. 2).
Deviations: from the public implementation (jiaweizzhao/GaLore)
- The low-rank form of ``golore``: W is frozen, the optimizer sees r-sized gradients, and so does every reduction.
- Everything that ``golore`` says of refreshes, sides and sharding.
- Adam sees s times the projected gradient, so that its epsilon acts as epsilon / s.
- Weight decay acts on the trained factor, that is on the change of W since the last refresh; W itself is not decayed.
- Singular vectors have a fixed sign, so that the kept momentum does not depend on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.config import flag
from megalowrank.methods.golore import GoLore, GoLoreConfig


@dataclass
class GaLoreConfig(GoLoreConfig):
    """As GoLore, with GaLore's defaults."""

    proj_scale: float = flag(0.25, "scale of the low-rank term")
    rand_ratio: float = flag(1.0, "share of the run after which subspaces are drawn at random; 1: never")
    proj_momentum: str = flag(
        "keep", "momentum when the subspace changes: expressed in the new one, or kept as it is",
        choices=("rotate", "keep"),
    )  # fmt: skip


class GaLore(GoLore):
    """GoLore with other defaults."""

    name = "galore"
    config_class = GaLoreConfig
