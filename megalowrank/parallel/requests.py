"""What one rank asks and all ranks must do at the same update: stop, save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.parallel.collectives import group_size
from megalowrank.parallel.heads import Heads

Source = Callable[[], bool]


class Requests:
    """Questions that every rank answers, and the answer that all agree on: whether any rank said yes.

    ``ask`` before an update begins an all-reduce of a few bytes on the host, ``answer`` after it finds it done:
    nothing waits for the device. Both are collective, ``ask`` first. ``group`` is one
    of gloo that nothing else uses at the same time, across ``heads`` if there are any; ``lasting`` names stay asked
    once they were: ``standing``.
    """

    def __init__(
        self,
        group: Any,
        sources: dict[str, Source],
        lasting: frozenset[str] = frozenset(),
        heads: Heads | None = None,
    ) -> None:
        self.group, self.sources, self.lasting, self.heads = group, sources, lasting, heads
        self.standing: frozenset[str] = frozenset()
        self._flags = torch.zeros(len(sources), dtype=torch.uint8)
        self._work: Any = None

    def ask(self) -> None:
        """Begin to find out. Every rank calls it, once for every ``answer``."""
        self._flags = torch.tensor([source() for source in self.sources.values()], dtype=torch.uint8)
        if group_size(self.group) > 1:
            self._work = self._reduce() if self.heads is None else self.heads.arrive(self._reduce)

    def answer(self) -> frozenset[str]:
        """The names that any rank said yes to when all were asked last; the same on every rank."""
        if self._work is not None and self.heads is not None:
            self.heads.wait(self._work, "the questions of an update")
        elif self._work is not None:
            self._work.wait()
        self._work = None
        said = {name for name, flag in zip(self.sources, self._flags.tolist(), strict=True) if flag}
        self._flags.zero_()
        self.standing = frozenset(said & self.lasting) | self.standing
        return self.standing | said

    def _reduce(self) -> Any:
        return dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)


def host_group(timeout: Any, heads: Heads | None = None) -> Any:
    """A gloo group of all ranks of the job, for the host; None in a single process. Every rank calls it."""
    if heads is not None:
        return heads.new_host_group()
    return dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
