"""One flat tensor for many parameters, where no engine has made one (dense training and ZeRO-0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalowrank.lowrank.state import FlatPartition, Fragment


def flatten_in_place(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Move the data of ``tensors`` (one dtype and device) into one flat tensor and make them views of it.

    Returns the flat tensor and the offset of each.
    """
    flat = torch.cat([tensor.data.reshape(-1) for tensor in tensors])
    offsets, position = [], 0
    for tensor in tensors:
        offsets.append(position)
        tensor.data = flat[position : position + tensor.numel()].view(tensor.shape)
        position += tensor.numel()
    return flat, offsets


def whole_partition(parameters: Sequence[torch.nn.Parameter], masters: Sequence[torch.Tensor]) -> FlatPartition:
    """A partition that holds all of ``parameters``; gradients are read from ``masters``, one each."""
    flat, offsets = flatten_in_place(masters)
    fragments = [Fragment(p, offset, 0, p.numel()) for p, offset in zip(parameters, offsets, strict=True)]
    return FlatPartition(flat, list(zip(masters, offsets, strict=True)), fragments)
