"""Token files: Megatron's .bin/.idx pairs, written, checked before use, and cut into samples.

``.bin`` is the tokens of all documents, end to end. ``.idx`` is a header, the length and byte offset of
every sequence, and for every document the sequence at which it begins (plus the end of the last one).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np

from megalowrank.data.index import DTYPES, HEADER, MAGIC, token_dtype
from megalowrank.data.spool import Spool, join
from megalowrank.errors import ConfigError

_SPLITS = ("train", "validation", "test")
_BLOCK = 1 << 22


def write_tokens(prefix: str | os.PathLike[str], documents: Iterable[np.ndarray], vocab_size: int) -> tuple[int, int]:
    """Write documents (1-d integer arrays of token ids) as ``prefix.bin`` and ``prefix.idx``.

    Tokens are stored as uint16 if ``vocab_size`` < 65500, else int32 (Megatron's rule). Both files are
    written beside their place and moved there when complete, the index last. Returns the number of
    documents and of tokens; ConfigError if a token is outside [0, vocab_size), or if there are none.
    """
    target = os.fspath(prefix)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    dtype = token_dtype(vocab_size)
    spool = Spool(f"{target}.{os.getpid()}.spool", dtype, vocab_size)
    try:
        for document in documents:
            spool.add(np.array([document.size]), document, np.zeros(1, np.int64))
        joined = join([(spool.stem, spool.close())], target, dtype, sizes=False)
    finally:
        spool.discard()
    return joined.documents, joined.tokens


class TokenFile:
    """A checked ``prefix.bin``/``prefix.idx`` pair, read through memory maps.

    ``tokens`` is flat [n_tokens] of ``dtype``; document d is tokens[document_start(d):document_start(d + 1)].
    ConfigError, naming the file, if one is missing, not a Megatron index, of another version, of no
    integer type, or if its sizes do not add up. The whole index is read once, in blocks.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        index_path, data_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        data_bytes, index_bytes = _file_size(data_path), _file_size(index_path)
        code, n_sequences, n_bounds = _read_header(index_path, index_bytes)
        self.dtype = np.dtype(DTYPES[code])
        self._pointers, self._bounds, self.n_tokens = _map_index(index_path, n_sequences, n_bounds, self.dtype.itemsize)
        self.n_documents = n_bounds - 1
        expected = self.n_tokens * self.dtype.itemsize
        if data_bytes != expected:
            raise ConfigError(f"{data_path} does not match its index", f"{data_bytes} bytes", expected)
        if not self.n_tokens:
            raise ConfigError(f"{data_path} holds no tokens")
        self.tokens = np.memmap(data_path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))

    def document_start(self, number: int) -> int:
        """The token at which document ``number`` begins; of n_documents it is n_tokens."""
        sequence = int(self._bounds[number])
        return (
            self.n_tokens if sequence == len(self._pointers) else int(self._pointers[sequence]) // self.dtype.itemsize
        )

    def max_token(self, sample: int | None = None) -> int:
        """The largest id among ``sample`` tokens spread evenly over the file, or among all (None).

        ConfigError if a negative id is among them.
        """
        blocks = _spread_blocks(self.n_tokens, self.n_tokens if sample is None else sample)
        ranges = [(self.tokens[a:b].min(), self.tokens[a:b].max()) for a, b in blocks]
        if min(low for low, _ in ranges) < 0:
            raise ConfigError(f"{self.prefix}.bin holds negative token ids")
        return int(max(high for _, high in ranges))


def _file_size(path: str) -> int:
    try:
        with open(path, "rb") as stream:
            return stream.seek(0, os.SEEK_END)
    except OSError as error:
        allowed = "a prefix with .bin and .idx beside each other (give it without the ending)"
        raise ConfigError(f"cannot read {path}", error.strerror, allowed) from None


def _read_header(path: str, size: int) -> tuple[int, int, int]:
    """dtype code, number of sequences and of document bounds; the file has the size they ask for."""
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise ConfigError(f"{path} is not a Megatron index", f"it begins {header[:9]!r}", repr(MAGIC))
    if len(header) < HEADER.size:
        raise ConfigError(f"{path} is truncated", f"{size} bytes", f"at least {HEADER.size}")
    _, version, code, n_sequences, n_bounds = HEADER.unpack(header)
    if version != 1:
        raise ConfigError(f"{path} has an unknown version", version, 1)
    if code not in DTYPES:
        known = ", ".join(f"{code} ({kind.__name__})" for code, kind in DTYPES.items())
        raise ConfigError(f"{path} has no integer token type", f"code {code}", known)
    expected = HEADER.size + n_sequences * (4 + 8) + n_bounds * 8
    if size != expected:
        raise ConfigError(f"{path} is truncated or has foreign content", f"{size} bytes", expected)
    return code, n_sequences, n_bounds


def _map_index(path: str, n_sequences: int, n_bounds: int, itemsize: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Byte offsets of sequences, first sequences of documents (both mapped, and checked), and the number of tokens."""
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)
    edges = np.cumsum([0, n_sequences * 4, n_sequences * 8, n_bounds * 8]).tolist()
    lengths, pointers, bounds = (
        mapped[start:stop].view(kind)
        for start, stop, kind in zip(edges[:-1], edges[1:], ("<i4", "<i8", "<i8"), strict=True)
    )
    n_tokens = 0
    for first in range(0, n_sequences, _BLOCK):
        block = lengths[first : first + _BLOCK]
        ends = n_tokens + np.cumsum(block, dtype=np.int64)
        starts = (ends - block) * itemsize
        if block.min() < 0 or not np.array_equal(starts, pointers[first : first + _BLOCK]):
            raise ConfigError(f"{path} is damaged: sequence lengths and offsets disagree")
        n_tokens = int(ends[-1])
    ordered = all((np.diff(bounds[first : first + _BLOCK + 1]) >= 0).all() for first in range(0, n_bounds, _BLOCK))
    if n_bounds < 1 or bounds[0] != 0 or bounds[-1] != n_sequences or not ordered:
        raise ConfigError(f"{path} is damaged: its documents do not cover its {n_sequences} sequences")
    return pointers, bounds, n_tokens


def _spread_blocks(total: int, sample: int) -> Iterator[tuple[int, int]]:
    """Blocks (start, stop) of range(total), evenly spread, of ``sample`` tokens together or slightly more."""
    sample = min(max(sample, 1), total)
    count = min(sample, max(64, -(-sample // _BLOCK)))
    size = -(-sample // count)
    for number in range(count):
        start = number * (total - size) // max(1, count - 1)
        yield start, start + size


class TokenWindow:
    """The tokens [start, stop) of a file as samples of ``seq_length`` + 1 tokens.

    Sample i begins at start + i * seq_length, so its last token is the first of sample i + 1: every
    token but the first is a target once. Tokens that do not fill a sample are left out.
    """

    def __init__(self, token_file: TokenFile, start: int, stop: int, seq_length: int) -> None:
        if seq_length < 1:
            raise ConfigError("--seq-length is out of range", seq_length, ">= 1")
        if not 0 <= start <= stop <= token_file.n_tokens:
            raise ValueError(f"no token range of {token_file.prefix}: [{start}, {stop})")
        self.token_file, self.start, self.stop, self.seq_length = token_file, start, stop, seq_length

    def __len__(self) -> int:
        return max(0, self.stop - self.start - 1) // self.seq_length

    def sample(self, index: int) -> np.ndarray:
        """A copy of sample ``index`` as int64 [seq_length + 1]; IndexError outside range(len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = self.start + index * self.seq_length
        return np.array(self.token_file.tokens[first : first + self.seq_length + 1], dtype=np.int64)


def split_documents(token_file: TokenFile, split: str, seq_length: int = 1) -> list[tuple[int, int]]:
    """Token ranges (start, stop) of train, validation and test documents for weights like "969,30,1".

    Whole documents, in file order; the weights are normalised and their running sums, times the number
    of documents, rounded (Megatron's rule). Weights left out are 0; a weight of 0 is an empty range.
    ConfigError if the weights are malformed, or one above 0 gets less than one sample of ``seq_length``.
    """
    weights = _parse_split(split)
    total = sum(weights)
    edges = [0.0, *accumulate(weight / total for weight in weights)]
    documents = [round(edge * token_file.n_documents) for edge in edges]
    offsets = [token_file.document_start(number) for number in documents]
    ranges = list(zip(offsets[:-1], offsets[1:], strict=True))
    for name, weight, (start, stop) in zip(_SPLITS, weights, ranges, strict=True):
        if weight and stop - start <= seq_length:
            got = f"{stop - start} tokens of {token_file.n_documents} documents"
            allowed = f"at least {seq_length + 1} tokens, or weight 0"
            raise ConfigError(f"--split {split} leaves the {name} split too few tokens", got, allowed)
    return ranges


def _parse_split(split: str) -> list[float]:
    parts = [part.strip() for part in split.split(",")]
    well_formed = len(parts) <= len(_SPLITS) and all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts)
    weights = [float(part) for part in parts] if well_formed else []
    if not 0 < sum(weights) < float("inf"):
        raise ConfigError("--split is malformed", repr(split), "up to three weights, like 969,30,1")
    return weights + [0.0] * (len(_SPLITS) - len(weights))
