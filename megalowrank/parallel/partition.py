"""How one dimension of a tensor is divided over tensor-parallel ranks.

Every rank stores equally many elements, ⌈size / ranks⌉, so that collectives and optimizer partitions are alike; where
the size does not divide, the last ranks hold fewer real ones and zeros after them. Those zeros belong to no logical
tensor: they are zero in W, A, B and candidates, get zero gradients, and stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """Elements [start, stop) of a dimension of ``size``, stored in front of ``padded`` elements."""

    size: int
    start: int
    stop: int
    padded: int

    @property
    def real(self) -> int:
        """Elements that are not padding."""
        return self.stop - self.start

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of ``whole`` along ``dim``, padded with zeros."""
        own = whole.narrow(dim, self.start, self.real)
        if self.real == self.padded:
            return own
        shape = list(whole.shape)
        shape[dim] = self.padded - self.real
        return torch.cat((own, whole.new_zeros(shape)), dim)


def share(size: int, rank: int = 0, ranks: int = 1) -> Share:
    """The share of ``rank`` among ``ranks`` of a dimension of ``size``; one rank has all of it."""
    padded = -(-size // ranks)
    start = min(rank * padded, size)
    return Share(size, start, min(start + padded, size), padded)
