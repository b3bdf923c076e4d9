"""A model without signs, for scores that want them (SynFlow), and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def unsigned(locate: Callable[[], Sequence[torch.Tensor]], embedding: Any) -> Iterator[None]:
    """While entered, the tensors of ``locate`` are their absolute values and ``embedding``, if any, gives ones.

    Of every element one sign is kept meanwhile, so that zeros and NaN too come back as they were. ``locate`` is asked
    again at the end: engines may have moved them.
    """
    with torch.no_grad():
        tensors = locate()
        signs = [tensor.signbit() for tensor in tensors]
        for tensor in tensors:
            tensor.abs_()
        del tensors
    if embedding is not None:
        embedding.ones = True
    try:
        yield
    finally:
        if embedding is not None:
            embedding.ones = False
        with torch.no_grad():
            for tensor, negative in zip(locate(), signs, strict=True):
                tensor.copy_(torch.where(negative, -tensor, tensor))
