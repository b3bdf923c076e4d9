"""The collectives between the linears of a tensor-parallel group, started or finished, on contiguous memory always.

Rows are dimension 0: the sequence under sequence parallelism, in equal parts by rank of the group. Every rank of
``wire.group`` calls each of them, in the same order; a group of one communicates nothing and copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megalowrank.parallel.wire import Wire


class Pending:
    """A collective under way. What is computed before ``wait`` overlaps with it."""

    def __init__(self, result: torch.Tensor, work: Any = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> torch.Tensor:
        """The result; on an accelerator the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def splits_sequence(wire: Wire) -> bool:
    """Whether activations between linears are really in several parts."""
    return wire.sequence and wire.size > 1


def start_gather(part: torch.Tensor, wire: Wire) -> Pending:
    """The rows of all ranks, [n, ..] -> [size · n, ..]; ``part`` itself where the sequence is not split."""
    if not splits_sequence(wire):
        return Pending(part)
    part = part.contiguous()
    whole = part.new_empty((part.shape[0] * wire.size, *part.shape[1:]))
    return Pending(whole, dist.all_gather_into_tensor(whole, part, group=wire.group, async_op=True))


def start_reduce(partial: torch.Tensor, wire: Wire) -> Pending:
    """The sum of all ranks' ``partial``; under sequence parallelism this rank's rows of it, [size · n, ..] -> [n, ..].

    An all-reduce works in place where ``partial`` is contiguous and on a copy where it is not: use the result.
    """
    if wire.size == 1:
        return Pending(partial)
    partial = partial.contiguous()
    if not wire.sequence:
        return Pending(partial, dist.all_reduce(partial, group=wire.group, async_op=True))
    own = partial.new_empty((partial.shape[0] // wire.size, *partial.shape[1:]))
    return Pending(own, dist.reduce_scatter_tensor(own, partial, group=wire.group, async_op=True))


def gather_rows(part: torch.Tensor, wire: Wire) -> torch.Tensor:
    """``start_gather``, finished."""
    return start_gather(part, wire).wait()


def reduce_rows(partial: torch.Tensor, wire: Wire) -> torch.Tensor:
    """``start_reduce``, finished."""
    return start_reduce(partial, wire).wait()


class _ReduceOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wire: Wire) -> torch.Tensor:
        ctx.wire = wire
        return reduce_rows(x if wire.sequence else x.clone(memory_format=torch.contiguous_format), wire)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_rows(gradients[0], ctx.wire), None


def reduce_output(x: torch.Tensor, wire: Wire) -> torch.Tensor:
    """Partial sums over the group -> their sum [S, ..], or this rank's rows [S / size, ..] of it.

    Backward hands the gradient of the sum to every rank: as it is, or gathered under sequence parallelism. ``x`` may
    have any strides and stays what it was.
    """
    return x if wire.size == 1 else _ReduceOutput.apply(x, wire)
