"""Sets of vectors of many factors, addressed at once.

A method moves a few rows of each of hundreds of factors per step. A ``VectorSet`` names them all;
its values travel packed, one after the other, in one 1-D tensor, so that every verb is a handful of
tensor operations whatever the number of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class VectorSet:
    """Row ``rows[i]`` of factor ``factors[i]``, ``lengths[i]`` elements each, in packed order.

    ``factors`` are indices into the list of factors (A of matrix j is 2j, Bᵀ is 2j + 1), all int64.
    """

    factors: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def whole(factors: list[int], rows: list[int], lengths: list[int]) -> VectorSet:
        """All ``rows[i]`` vectors of ``lengths[i]`` elements of factor ``factors[i]``, factor by factor."""
        number = np.concatenate([np.arange(count) for count in rows]) if rows else np.zeros(0, dtype=np.int64)
        owners, widths = np.array(factors, dtype=np.int64), np.array(lengths, dtype=np.int64)
        return VectorSet(np.repeat(owners, rows), number, np.repeat(widths, rows))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Start of each vector in the packed values."""
        return self.lengths.cumsum() - self.lengths

    @cached_property
    def numel(self) -> int:
        """Elements of the packed values."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: VectorSet) -> VectorSet:
        return VectorSet(
            np.concatenate((self.factors, other.factors)),
            np.concatenate((self.rows, other.rows)),
            np.concatenate((self.lengths, other.lengths)),
        )


def element_index(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """Indices start, start+1, … of every run, one run after the other: int64 [sum(lengths)] on ``device``.

    On an accelerator only the runs travel, the indices are expanded there.
    """
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    shift = starts - ends + lengths
    if device.type == "cpu":
        index = shift.repeat(lengths)
        index += np.arange(total)
        return torch.from_numpy(index)
    runs = torch.from_numpy(np.stack((shift, lengths))).to(device, non_blocking=True)
    return torch.repeat_interleave(runs[0], runs[1], output_size=total) + torch.arange(total, device=device)


def clip_runs(
    starts: np.ndarray, lengths: np.ndarray, low: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Clip runs [start, start + length) to windows [low, low + size), element by element of the arrays.

    Returns (elements cut from the front, elements left); nothing left is 0.
    """
    first = np.maximum(starts, low)
    last = np.minimum(starts + lengths, low + size)
    return first - starts, np.maximum(last - first, 0)
