"""Full-rank training: the baseline every method is compared with.

Paper: none; plain AdamW (Loshchilov and Hutter 2019) on every weight.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.methods.base import Method


@dataclass
class FullRankConfig:
    """Full-rank training has no flags of its own."""

    def check(self) -> None:
        """Nothing to check."""


class FullRank(Method):
    """Every weight is trained; nothing happens between steps."""

    name = "full"
    config_class = FullRankConfig
