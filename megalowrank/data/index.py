"""Megatron's ``.idx`` format: constants, and a writer whose memory does not grow with the number of documents."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {kind: code for code, kind in DTYPES.items()}
_UINT16_VOCAB = 65500
_STEP = 1 << 19


def token_dtype(vocab_size: int) -> type:
    """How tokens of a vocabulary are stored: uint16 below 65500 (Megatron's rule), else int32."""
    return np.uint16 if vocab_size < _UINT16_VOCAB else np.int32


def write_index(
    path: str | os.PathLike[str], dtype: type, n_documents: int, lengths: Callable[[], Iterable[np.ndarray]]
) -> None:
    """Write the index of documents of one sequence each, and sync it.

    ``lengths()`` gives their lengths in tokens, in order, in blocks (int32 [n]); it is called twice.
    """
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, _CODES[dtype], n_documents, n_documents + 1))
        for block in lengths():
            _put(stream, block, "<i4")
        for starts in _running_starts(lengths()):
            _put(stream, starts * np.dtype(dtype).itemsize, "<i8")
        for first in range(0, n_documents + 1, _STEP):
            _put(stream, np.arange(first, min(first + _STEP, n_documents + 1)), "<i8")
        stream.flush()
        os.fsync(stream.fileno())


def _running_starts(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = total + np.cumsum(block, dtype=np.int64)
        yield ends - block
        total = int(ends[-1]) if len(ends) else total


def _put(stream: BinaryIO, values: np.ndarray, dtype: str) -> None:
    stream.write(values.astype(dtype).tobytes())
