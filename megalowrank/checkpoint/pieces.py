"""Coordinates of the parts of a logical tensor, and putting a tensor together from any of them.

A part is named by a *box* (start, stop, step per dimension of the global tensor) and a *flat* range of the
box's elements in row-major order. A tensor-parallel slice, the rows c::dp and a ZeRO fragment are all of this
kind, so whatever one topology saved, another can read. Pure functions: no collectives, no files.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalowrank.errors import ConfigError

Box = tuple[tuple[int, int, int], ...]
Flat = tuple[int, int]
Index = slice | Tensor
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
}

_CHUNK = 1 << 22  # elements indexed at a time when boxes differ: bounds the int64 scratch to about 100 MB


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a logical tensor held by one rank.

    ``name`` is the logical name, ``shape`` the global shape, ``box`` one (start, stop, step) per dimension,
    ``flat`` a range within the row-major flattened box, ``tensor`` its 1-D contiguous elements. Raises
    ConfigError where these do not agree. The memory of ``tensor`` is not copied.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    flat: Flat
    tensor: Tensor

    def __post_init__(self) -> None:
        check_place(self.name, self.shape, self.box, self.flat)
        if self.tensor.dtype not in DTYPES.values():
            raise ConfigError(f"{self.name} has a type checkpoints do not hold", self.tensor.dtype)
        if self.tensor.ndim != 1 or not self.tensor.is_contiguous():
            raise ConfigError(f"a piece of {self.name} must be 1-D and contiguous", tuple(self.tensor.shape))
        if self.tensor.numel() != self.flat[1] - self.flat[0]:
            raise ConfigError(
                f"a piece of {self.name} has the wrong number of elements",
                self.tensor.numel(),
                self.flat[1] - self.flat[0],
            )

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """The complete tensor, of any shape (0-dimensional included)."""
        shape = tuple(tensor.shape)
        return cls(name, shape, full_box(shape), (0, tensor.numel()), _flattened(tensor))

    @classmethod
    def fragment(cls, name: str, shape: Sequence[int], start: int, tensor: Tensor) -> Piece:
        """The elements start .. start + n of the flattened tensor of this global shape, as ZeRO cuts it."""
        box = full_box(shape)
        return cls(name, tuple(shape), box, (start, start + tensor.numel()), tensor.detach())

    @classmethod
    def rows(cls, name: str, shape: Sequence[int], first: int, step: int, tensor: Tensor) -> Piece:
        """The rows first::step of a tensor of this global shape; ``tensor`` is (rows, *shape[1:])."""
        shape = tuple(shape)
        if tensor.ndim != len(shape) or tuple(tensor.shape[1:]) != shape[1:]:
            raise ConfigError(f"rows of {name} do not fit {shape}", tuple(tensor.shape))
        box = ((min(first, shape[0]), shape[0], step), *full_box(shape[1:]))
        return cls(name, shape, box, (0, box_numel(box)), _flattened(tensor))

    def part(self, start: int, stop: int) -> Tensor:
        """This range of the piece's own elements, on the CPU."""
        return self.tensor[start:stop].cpu()

    def record(self, key: str) -> dict[str, Any]:
        """What a rank writes down about this piece, saved under ``key``, as JSON data."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        place = {"box": self.box, "flat": self.flat}
        return {"name": self.name, "shape": self.shape, "dtype": dtype, "key": key, **place}


@dataclass(frozen=True)
class SavedPart:
    """Where a piece lies in a checkpoint: under ``key`` in ``file``."""

    file: str
    key: str
    box: Box
    flat: Flat


@dataclass(frozen=True)
class SavedTensor:
    """A logical tensor in a checkpoint: its global shape, its type and the pieces that hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[SavedPart, ...]

    @classmethod
    def parse(cls, name: str, saved: Mapping[str, Any]) -> SavedTensor:
        """From the manifest's JSON; ConfigError, KeyError, TypeError or ValueError if it makes no sense."""
        shape = tuple(operator.index(size) for size in saved["shape"])
        parts = tuple(_parse_part(piece) for piece in saved["pieces"])
        for part in parts:
            check_place(name, shape, part.box, part.flat)
        held = sum(part.flat[1] - part.flat[0] for part in parts)
        if held != math.prod(shape):
            raise ConfigError(f"the manifest lists {held} elements of {name}", allowed=math.prod(shape))
        return cls(name, shape, DTYPES[saved["dtype"]], parts)

    def read(self, load: Callable[[SavedPart, int, int], Tensor], box: Box | None, flat: Flat | None) -> Tensor:
        """The elements ``flat`` of ``box`` (default: all), 1-D; ``load`` gives a range of a saved piece."""
        assembly = Assembly(self.name, self.shape, self.dtype, box, flat)
        for part in self.parts:
            assembly.put(part.box, part.flat, functools.partial(load, part))
        return assembly.finish()


def merge_records(files: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The manifest's tensors out of the records of every rank, keyed by the file of the rank.

    Raises ConfigError if the records disagree on a shape or type, or if the pieces of a tensor do not hold
    each of its elements exactly once.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for file, records in files.items():
        for piece in records:
            kind = {"shape": piece["shape"], "dtype": piece["dtype"]}
            saved = tensors.setdefault(piece["name"], {**kind, "pieces": []})
            known = {"shape": saved["shape"], "dtype": saved["dtype"]}
            if known != kind:
                raise ConfigError(f"ranks disagree on {piece['name']}", f"{known} and {kind}")
            saved["pieces"].append({"file": file, **{at: piece[at] for at in ("key", "box", "flat")}})
    for name, saved in tensors.items():
        check_cover(name, saved["shape"], [(piece["box"], piece["flat"]) for piece in saved["pieces"]])
    return tensors


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These CPU tensors, copied where two overlap in memory (safetensors refuses to write such)."""
    apart: dict[str, Tensor] = {}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        apart[key] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart


def full_box(shape: Sequence[int]) -> Box:
    """The box that holds every element of a tensor of this shape."""
    return tuple((0, size, 1) for size in shape)


def box_numel(box: Box) -> int:
    """The number of elements in a box; 1 for the box of a 0-dimensional tensor."""
    return math.prod(len(range(*side)) for side in box)


def check_place(name: str, shape: Sequence[int], box: Box, flat: Flat) -> None:
    """Raise ConfigError unless the box lies in the shape and the flat range in the box."""
    if len(box) != len(shape) or any(len(side) != 3 for side in box) or len(flat) != 2:
        raise ConfigError(f"the box of {name} must be (start, stop, step) per dimension of {shape}", box)
    for (start, stop, step), size in zip(box, shape, strict=True):
        if not (0 <= start <= stop <= size and step >= 1):
            raise ConfigError(f"a box of {name} leaves its shape {tuple(shape)}", box)
    if not 0 <= flat[0] <= flat[1] <= box_numel(box):
        raise ConfigError(f"a range of {name} leaves its box", flat, f"0 .. {box_numel(box)}")


def overlaps(saved: Box, saved_flat: Flat, want: Box, want_flat: Flat) -> Iterator[tuple[Index, Index]]:
    """What two parts share, as pairs of an index into the saved 1-D part and one into the wanted part.

    The indices count from the start of each part's flat range, ascend, and are two slices or two int64
    tensors of equal length; nothing is given where nothing is shared.
    """
    shared = _meet(saved, want)
    if shared is None:
        return
    source_run, target_run = _run(shared, saved), _run(shared, want)
    if source_run is None or target_run is None:
        yield from _scattered(shared, (saved, saved_flat), (want, want_flat))
        return
    shift = source_run[0] - target_run[0]
    start = max(source_run[0], saved_flat[0], want_flat[0] + shift)
    stop = min(source_run[1], saved_flat[1], want_flat[1] + shift)
    if start < stop:
        base = want_flat[0] + shift
        yield slice(start - saved_flat[0], stop - saved_flat[0]), slice(start - base, stop - base)


def _scattered(shared: list[range], saved: tuple[Box, Flat], want: tuple[Box, Flat]) -> Iterator[tuple[Tensor, Tensor]]:
    (saved_box, saved_flat), (want_box, want_flat) = saved, want
    source_rows, source_inner = _offsets(shared, saved_box)
    target_rows, target_inner = _offsets(shared, want_box)
    inside = _reached(source_rows, saved_box, saved_flat) & _reached(target_rows, want_box, want_flat)
    source_rows, target_rows = source_rows[inside], target_rows[inside]
    height = max(1, _CHUNK // source_inner.numel())
    for row in range(0, source_rows.numel(), height):
        source = (source_rows[row : row + height, None] + source_inner).reshape(-1)
        target = (target_rows[row : row + height, None] + target_inner).reshape(-1)
        keep = (source >= saved_flat[0]) & (source < saved_flat[1])
        keep &= (target >= want_flat[0]) & (target < want_flat[1])
        if keep.any():
            yield source[keep] - saved_flat[0], target[keep] - want_flat[0]


class Assembly:
    """A wanted part of a tensor while it is filled from saved parts."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, box: Box | None, flat: Flat | None
    ) -> None:
        """Want the elements ``flat`` of ``box`` (default: all); ConfigError if they leave the shape."""
        self.name = name
        self.box = full_box(shape) if box is None else box
        self.flat = (0, box_numel(self.box)) if flat is None else flat
        check_place(name, shape, self.box, self.flat)
        self.target = torch.empty(self.flat[1] - self.flat[0], dtype=dtype)
        self._filled = torch.zeros(self.target.numel(), dtype=torch.bool)

    def put(self, box: Box, flat: Flat, load: Callable[[int, int], Tensor]) -> None:
        """Copy what a saved part shares with the wanted one.

        ``load(start, stop)`` gives that range of the saved part's 1-D elements; it is called only for
        ranges that hold something wanted.
        """
        for source, target in overlaps(box, flat, self.box, self.flat):
            if isinstance(source, slice):
                values = load(source.start, source.stop)
            else:
                values = load(int(source[0]), int(source[-1]) + 1)[source - source[0]]
            if values.dtype != self.target.dtype:
                raise ConfigError(f"a piece of {self.name} has another type", values.dtype, self.target.dtype)
            self.target[target] = values
            self._filled[target] = True

    def finish(self) -> Tensor:
        """The 1-D elements asked for; ConfigError naming the tensor if no part held some of them."""
        missing = int((~self._filled).sum())
        if missing:
            raise ConfigError(f"the checkpoint lacks {missing} of {self.target.numel()} elements of {self.name}")
        return self.target


def assemble(pieces: Sequence[Piece], box: Box | None = None, flat: Flat | None = None) -> Tensor:
    """The elements ``flat`` of ``box`` (default: all) out of pieces of one tensor, as a 1-D CPU tensor.

    Raises ConfigError if the pieces do not hold all of it.
    """
    first = pieces[0]
    assembly = Assembly(first.name, first.shape, first.tensor.dtype, box, flat)
    for piece in pieces:
        assembly.put(piece.box, piece.flat, piece.part)
    return assembly.finish()


def check_cover(name: str, shape: Sequence[int], places: Sequence[tuple[Box, Flat]]) -> None:
    """Raise ConfigError unless the parts hold every element of the tensor exactly once."""
    claimed = sum(stop - start for _, (start, stop) in places)
    if claimed < math.prod(shape):
        raise ConfigError(f"no rank holds {math.prod(shape) - claimed} of the elements of {name} {tuple(shape)}")
    ordered = sorted(((box, flat) for box, flat in places if flat[0] < flat[1]), key=lambda place: place[1])
    by_box: dict[tuple[range, ...], list[tuple[Box, Flat]]] = {}
    for box, flat in ordered:
        by_box.setdefault(_ranges(box), []).append((box, flat))
    for same in by_box.values():
        for (_, before), (_, after) in zip(same, same[1:], strict=False):
            if after[0] < before[1]:
                raise ConfigError(f"two pieces hold the same elements of {name}", f"{before} and {after}")
    groups = list(by_box.values())
    if _strided(list(by_box)):
        return
    for index, one in enumerate(groups):
        for other in groups[index + 1 :]:
            _check_apart(name, one, other)


def _strided(boxes: Sequence[tuple[range, ...]]) -> bool:
    """Whether boxes are the rows c, c + n, c + 2n, ... of one box, each with a c of its own: then they are apart.

    Candidates lie so on data-parallel ranks, hundreds of which would take minutes two by two.
    """
    if not boxes or not boxes[0]:
        return False
    step, rest = boxes[0][0].step, boxes[0][1:]
    same = all(box[0].step == step and box[1:] == rest for box in boxes)
    return same and len({box[0].start % step for box in boxes}) == len(boxes)


def _check_apart(name: str, one: list[tuple[Box, Flat]], other: list[tuple[Box, Flat]]) -> None:
    if _meet(one[0][0], other[0][0]) is None:
        return
    for box, flat in one:
        for box2, flat2 in other:
            if next(overlaps(box, flat, box2, flat2), None) is not None:
                raise ConfigError(f"two pieces hold the same elements of {name}", f"boxes {box} and {box2}")


def _parse_part(piece: Mapping[str, Any]) -> SavedPart:
    box = tuple((operator.index(a), operator.index(b), operator.index(c)) for a, b, c in piece["box"])
    start, stop = piece["flat"]
    return SavedPart(str(piece["file"]), str(piece["key"]), box, (operator.index(start), operator.index(stop)))


def _flattened(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1)


def _ranges(box: Box) -> tuple[range, ...]:
    return tuple(range(*side) for side in box)


def _meet(one: Box, other: Box) -> list[range] | None:
    shared = []
    for a, b in zip(_ranges(one), _ranges(other), strict=True):
        both = _common(a, b)
        if not both:
            return None
        shared.append(both)
    return shared


def _common(a: range, b: range) -> range:
    divisor = math.gcd(a.step, b.step)
    if (b.start - a.start) % divisor:
        return range(0)
    modulus = b.step // divisor
    turns = (b.start - a.start) // divisor * pow(a.step // divisor, -1, modulus) % modulus
    step = a.step * modulus
    first = a.start + turns * a.step
    first += max(0, -(-(max(a.start, b.start) - first) // step)) * step
    return range(first, min(a.stop, b.stop), step)


def _run(shared: list[range], box: Box) -> Flat | None:
    """The range of the flattened box that the shared elements fill, None if they leave gaps in it."""
    sides = _ranges(box)
    if not sides:
        return 0, 1
    if shared[1:] != list(sides[1:]) or (len(shared[0]) > 1 and shared[0].step != sides[0].step):
        return None
    first, inner = (shared[0].start - sides[0].start) // sides[0].step, box_numel(box[1:])
    return first * inner, (first + len(shared[0])) * inner


def _offsets(shared: list[range], box: Box) -> tuple[Tensor, Tensor]:
    """Where the shared elements lie in the flattened box: offset per row, and offsets within a row."""
    sides: list[Tensor] = []
    stride = 1
    for both, side in zip(reversed(shared), reversed(_ranges(box)), strict=True):
        first, step = (both.start - side.start) // side.step, both.step // side.step
        sides.insert(0, (torch.arange(len(both)) * step + first) * stride)
        stride *= len(side)
    inner = torch.zeros(1, dtype=torch.int64)
    for side_offsets in sides[1:]:
        inner = (inner[:, None] + side_offsets).reshape(-1)
    return sides[0], inner


def _reached(rows: Tensor, box: Box, flat: Flat) -> Tensor:
    return (rows < flat[1]) & (rows + box_numel(box[1:]) > flat[0])
