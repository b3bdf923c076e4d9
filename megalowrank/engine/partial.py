"""Gradients that need other ranks: partial sums over tensor-parallel ranks, what heads share; the norm over ranks.

Which parameters those are is marked where the layers are built (``parallel.wire``). They are reduced once per update
where the engine leaves gradients alone until the last backward pass is over (ZeRO-0, and ZeRO-1 without
``overlap_comm``), in one collective for all of them; otherwise each as it arrives, before the engine takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megalowrank.engine.optimizer import gradients_of
from megalowrank.parallel.collectives import group_size, sum_over
from megalowrank.parallel.heads import Heads


class PartialGradients:
    """Keeps the gradients of ``parameters`` complete over ``group``.

    ``passes``: backward passes of an update. With ``per_update`` their sum is reduced at the end of the last one, else
    the gradient of every pass. Every rank of the group makes the same backward passes.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], group: Any, passes: int, per_update: bool) -> None:
        self.parameters, self.group, self.passes = list(parameters), group, passes
        self._seen = 0
        if not self.parameters:
            self._hooks = []
        elif per_update:
            self._hooks = [self.parameters[0].register_hook(self._count)]
        else:
            self._hooks = [parameter.register_hook(self._reduce) for parameter in self.parameters]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _complete(self, gradient: torch.Tensor) -> torch.Tensor:
        """What a partial gradient is part of; it may be overwritten."""
        return sum_over(gradient, self.group)

    def _reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._complete(gradient.contiguous().clone())

    def _count(self, gradient: torch.Tensor) -> None:
        """Called in every backward pass; the last one of an update reduces what has added up by its end."""
        self._seen += 1
        if self._seen == self.passes:
            self._seen = 0
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce_all)

    @torch.no_grad()
    def _reduce_all(self) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = self._complete(_flatten_dense_tensors(gradients))
            for gradient, whole in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(whole)


class SharedGradients(PartialGradients):
    """Gives ``parameters``, which heads share, the mean of the gradients of all ``heads``."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], heads: Heads, passes: int, per_update: bool) -> None:
        super().__init__(parameters, heads, passes, per_update)

    def _complete(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.group.mean_in_order(gradient.flatten(), "a gradient that heads share").view_as(gradient)


class NormOverRanks:
    """The norm of all gradients of a layer's tensor-parallel ranks; what they hold alike counts once.

    It is averaged rather than taken from one rank, so that a value that is not finite anywhere is so everywhere.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, owners: list[torch.nn.Parameter]) -> torch.Tensor:
        """Norm of the gradients of ``owners``; every rank of the group calls it and gets the same."""
        split = gradients_of(p for p in owners if getattr(p, "tensor_model_parallel", False))
        alike = gradients_of(p for p in owners if not getattr(p, "tensor_model_parallel", False))
        squares = torch.zeros(2, dtype=owners[0].dtype, device=owners[0].device)
        for i, gradients in enumerate((split, alike)):
            if gradients:
                squares[i] = torch.stack(torch._foreach_norm(gradients)).square().sum()
        split_square, alike_square = sum_over(squares, self.group)
        return (split_square + alike_square / group_size(self.group)).sqrt()
