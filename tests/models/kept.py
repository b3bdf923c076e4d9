"""What autograd really keeps: storages saved by a forward pass, and the most that is alive at one time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Kept:
    """While active: bytes of the distinct storages that autograd saves, without those of ``known`` tensors."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._held: dict[int, torch.Tensor] = {}
        self._stack = ExitStack()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._known:
            self._held[address] = tensor
        return tensor

    def __enter__(self) -> Kept:
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that were saved."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._held.values())


class Peak(TorchDispatchMode):
    """While active: the most bytes of storages that operators made and that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(t)}
        for tensor in filter(_is, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._alive and id(storage) not in before:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
