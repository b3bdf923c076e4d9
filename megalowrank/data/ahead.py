"""Reading ahead: the batches of the next update are read while this one trains."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalowrank.data.sampler import GlobalBatches


class BatchesAhead:
    """The micro-batches of this rank, update by update, with those of the following update read in a thread.

    ``place`` is (rank, ranks) among those that share every batch; ``waited`` is how many seconds callers of ``take``
    waited in all. What is returned does not depend on what was read ahead: another update than the expected one is read
    when it is asked for.
    """

    def __init__(
        self, samples: GlobalBatches, micro_batch_size: int, accumulation: int, dp_rank: int, dp_size: int
    ) -> None:
        self.samples, self.accumulation, self.place = samples, accumulation, (dp_rank, dp_size)
        self._layout = micro_batch_size, dp_rank, dp_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: tuple[int, Future[list[torch.Tensor]]] | None = None
        self.waited = 0.0

    def take(self, attempt: int) -> list[torch.Tensor]:
        """The micro-batches of update ``attempt``, ``accumulation`` of them, each int64 [micro, seq_length + 1].

        Errors of reading are raised here, those of reading ahead when the update is asked for.
        """
        started = time.perf_counter()
        try:
            coming, self._coming = self._coming, None
            batches = coming[1].result() if coming and coming[0] == attempt else self._read(attempt)
        finally:
            self.waited += time.perf_counter() - started
        self._coming = attempt + 1, self._pool.submit(self._read, attempt + 1)
        return batches

    def peek(self, attempt: int) -> list[torch.Tensor]:
        """As ``take``, now and for a look: what is read ahead stays."""
        return self._read(attempt)

    def close(self) -> None:
        """End the thread; no update can be taken afterwards."""
        self._coming = None
        self._pool.shutdown(cancel_futures=True)

    def _read(self, attempt: int) -> list[torch.Tensor]:
        return [self.samples.micro_batch(attempt, index, *self._layout) for index in range(self.accumulation)]
