"""Workers: processes that tokenize parts of the input, each into a spool of its own."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np

from megalowrank.data.files import write_whole
from megalowrank.data.index import token_dtype
from megalowrank.data.sources import Part, Source
from megalowrank.data.spool import ENDINGS, Spool, SpoolRecord
from megalowrank.data.tokenizers import Tokenizer, encode_documents, load_tokenizer
from megalowrank.errors import ConfigError, TrainingError

_BATCH_CHARACTERS = 1 << 18
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PartTask:
    """Part ``number`` of the whole input."""

    number: int
    source: Source
    part: Part


@dataclass
class Progress:
    """How far a run is. Weights are bytes of input; ``text_bytes`` are bytes of text tokenized by this run."""

    total_parts: int
    total_weight: int
    parts: int = 0
    weight: int = 0
    text_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    kept_weight: int = 0

    def resume(self, parts: int, weight: int) -> None:
        """Count ``parts`` of an earlier run as done."""
        self.parts, self.weight, self.kept_weight = parts, weight, weight

    @property
    def megabytes_per_second(self) -> float:
        """Speed of this run in 10**6 bytes of text per second."""
        return self.text_bytes / 1e6 / max(1e-9, time.monotonic() - self.started)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the parts that this run finished; None before the first."""
        done = self.weight - self.kept_weight
        elapsed = time.monotonic() - self.started
        return elapsed * (self.total_weight - self.weight) / done if done else None


class Worker:
    """Tokenizes parts with its own tokenizer. ``counted`` is called with bytes of text as they are done."""

    def __init__(
        self, folder: Path, path: str, kind: str | None, eos: int | None, counted: Callable[[int], None]
    ) -> None:
        self.folder, self.eos, self.counted = folder, eos, counted
        self.tokenizer: Tokenizer = load_tokenizer(path, kind)
        self.vocab_size = self.tokenizer.vocab_size()

    def finish(self, task: PartTask) -> SpoolRecord:
        """Write the spool of a part, then its record: where the record is, the part is complete."""
        stem = self.folder / f"{task.number:08d}"
        temporary = f"{stem}.tmp{os.getpid()}"
        spool = Spool(temporary, token_dtype(self.vocab_size), self.vocab_size)
        try:
            for texts in _batches(task.source.read(task.part)):
                sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
                spool.add(*encode_documents(self.tokenizer, texts, self.eos), sizes)
                self.counted(int(sizes.sum()))
            record = spool.close()
            for ending in ENDINGS:
                os.replace(temporary + ending, f"{stem}{ending}")
            write_whole(f"{stem}.json", json.dumps(record.as_json()).encode())
            return record
        finally:
            spool.discard()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of about 2**18 characters together; empty texts are left out."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def finish_parts(
    tasks: Sequence[PartTask],
    folder: Path,
    tokenizer: str,
    kind: str | None,
    eos: int | None,
    workers: int,
    state: Progress,
    progress: Callable[[Progress], None],
) -> dict[int, SpoolRecord]:
    """Records of the parts, made by ``workers`` processes; ``progress`` is called now and twice a second.

    The first error of a worker ends all. TrainingError if a worker process dies.
    """
    progress(state)
    if not tasks:
        return {}
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    records: dict[int, SpoolRecord] = {}
    workers = min(workers, len(tasks))
    arguments = (folder, tokenizer, kind, eos, counter, stop)
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        try:
            for finished in _finished(pool, tasks, 2 * workers):
                records.update({task.number: record for task, record in finished})
                state.parts += len(finished)
                state.weight += sum(task.part.weight for task, _ in finished)
                state.text_bytes = counter.value
                progress(state)
        except BrokenProcessPool:
            raise TrainingError("a worker process died (out of memory?); run again: finished parts are kept") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return records


def _finished(
    pool: ProcessPoolExecutor, tasks: Sequence[PartTask], at_once: int
) -> Iterator[list[tuple[PartTask, SpoolRecord]]]:
    """What was finished since the last time, twice a second at least; ``at_once`` tasks are handed out."""
    coming = iter(tasks)
    waiting: dict[Future, PartTask] = {}
    while True:
        for task in itertools.islice(coming, at_once - len(waiting)):
            waiting[pool.submit(_finish, task)] = task
        if not waiting:
            return
        done = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED).done
        yield [(waiting.pop(future), future.result()) for future in done]


_worker: Worker | None = None


def _start_worker(folder: Path, tokenizer: str, kind: str | None, eos: int | None, counter: Any, stop: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def counted(size: int) -> None:
        if stop.is_set():
            raise ConfigError("stopped, because another part failed")
        with counter.get_lock():
            counter.value += size

    _worker = Worker(folder, tokenizer, kind, eos, counted)


def _finish(task: PartTask) -> SpoolRecord:
    assert _worker is not None
    return _worker.finish(task)


def _end_with_parent() -> None:
    """A killed parent must not leave workers behind: they would write beside the next run's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
