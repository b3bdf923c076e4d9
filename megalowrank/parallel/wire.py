"""How the parallel linears of a model talk to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Wire:
    """The tensor-parallel group of a linear and what travels in its collectives.

    ``sequence``: activations between linears are split over the group by position (sequence parallelism).
    ``ride``: the rank-r product shares the buffer of the collective that the layer pays anyway; otherwise (*partial*)
    the product with the replicated factor is repeated on every rank and the gradient of that factor is left a partial
    sum, to be reduced over the group before the optimizer sees it.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    sequence: bool = False
    ride: bool = True

    def schedule(self, ride: bool) -> Wire:
        """The same wire with the other schedule."""
        return replace(self, ride=ride)


_PARTIAL = "megalowrank_partial_gradient"
_SHARED = "megalowrank_shared_by_heads"


def mark_partial(parameter: torch.nn.Parameter) -> None:
    """Say that backward leaves a partial sum over the tensor-parallel group as the gradient of ``parameter``."""
    setattr(parameter, _PARTIAL, True)


def partial_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The marked parameters of ``module`` that are trained, each once, in the order of the module."""
    return [p for p in module.parameters() if p.requires_grad and hasattr(p, _PARTIAL)]


def mark_shared(parameter: torch.nn.Parameter) -> None:
    """Say that ``parameter`` is the same in all heads, which train apart otherwise, and so must its gradient be."""
    setattr(parameter, _SHARED, True)


def shared_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of ``module`` that are marked so, each once, in the order of the module."""
    return [p for p in module.parameters() if p.requires_grad and hasattr(p, _SHARED)]
