"""Coordinates of tensor parts against a numpy reference that indexes element by element."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megalowrank.checkpoint import pieces as pieces_module
from megalowrank.checkpoint.pieces import (
    Box,
    Flat,
    Piece,
    assemble,
    box_numel,
    check_cover,
    full_box,
    overlaps,
    unshared,
)
from megalowrank.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.uint8]


def elements(shape: tuple[int, ...], box: Box, flat: Flat) -> np.ndarray:
    """The global element numbers of a part, by plain numpy slicing."""
    numbers = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return numbers[tuple(slice(*side) for side in box)].reshape(-1)[slice(*flat)]


def part(name: str, tensor: torch.Tensor, box: Box, flat: Flat) -> Piece:
    shape = tuple(tensor.shape)
    values = tensor.reshape(-1)[torch.from_numpy(elements(shape, box, flat).copy())]
    return Piece(name, shape, box, flat, values)


def random_shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 4)))


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    sides = []
    for size in shape:
        start = rng.randint(0, size)
        sides.append((start, rng.randint(start, size), rng.randint(1, 4)))
    return tuple(sides)


def random_flat(rng: random.Random, box: Box) -> Flat:
    start, stop = sorted((rng.randint(0, box_numel(box)), rng.randint(0, box_numel(box))))
    return start, stop


def random_tensor(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randint(0, 100, shape, generator=generator).to(rng.choice(DTYPES))


def cut(rng: random.Random, box: Box, parts: int) -> Iterator[tuple[Box, Flat]]:
    """ZeRO fragments of a box, of unequal size, some of them empty."""
    marks = sorted(rng.randint(0, box_numel(box)) for _ in range(parts - 1))
    yield from ((box, flat) for flat in zip([0, *marks], [*marks, box_numel(box)], strict=True))


def partition(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[Box, Flat]]:
    """A topology: tensor-parallel slices or interleaved rows of one dimension, each cut by ZeRO."""
    boxes = [full_box(shape)]
    if shape and rng.random() < 0.8:
        side, ways = rng.randrange(len(shape)), rng.randint(1, 4)
        size = shape[side]
        if rng.random() < 0.5:
            sides = [(min(rank, size), size, ways) for rank in range(ways)]
        else:
            marks = [size * rank // ways for rank in range(ways + 1)]
            sides = [(start, stop, 1) for start, stop in zip(marks, marks[1:], strict=False)]
        boxes = [(*boxes[0][:side], chosen, *boxes[0][side + 1 :]) for chosen in sides]
    return [place for box in boxes for place in cut(rng, box, rng.randint(1, 4))]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_overlaps_match_numpy(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(pieces_module, "_CHUNK", chunk)
    rng = random.Random(chunk)
    found = 0
    for _ in range(3000):
        shape = random_shape(rng)
        saved, want = random_box(rng, shape), random_box(rng, shape)
        saved_flat, want_flat = random_flat(rng, saved), random_flat(rng, want)
        source, target = elements(shape, saved, saved_flat), elements(shape, want, want_flat)
        pairs: list[tuple[int, int]] = []
        for one, other in overlaps(saved, saved_flat, want, want_flat):
            left, right = torch.arange(len(source))[one].tolist(), torch.arange(len(target))[other].tolist()
            assert left == sorted(left)
            pairs += zip(left, right, strict=True)
        where = {number: index for index, number in enumerate(source)}
        expected = [(where[number], index) for index, number in enumerate(target) if number in where]
        assert sorted(pairs) == sorted(expected)
        found += bool(pairs)
    assert found > 100


def test_any_partition_is_read_under_any_other() -> None:
    rng = random.Random(1)
    for _ in range(400):
        shape = random_shape(rng)
        tensor = random_tensor(rng, shape)
        saved = [part("w", tensor, box, flat) for box, flat in partition(rng, shape)]
        rng.shuffle(saved)
        check_cover("w", shape, [(piece.box, piece.flat) for piece in saved])
        for box, flat in [*partition(rng, shape), (random_box(rng, shape), None)]:
            flat = random_flat(rng, box) if flat is None else flat
            got = assemble(saved, box, flat)
            assert got.dtype == tensor.dtype
            assert torch.equal(got, part("w", tensor, box, flat).tensor)
        assert torch.equal(assemble(saved).reshape(shape), tensor)


def test_missing_elements_are_named() -> None:
    rng = random.Random(2)
    for _ in range(200):
        shape = random_shape(rng)
        saved = [part("lost/w", random_tensor(rng, shape), *place) for place in partition(rng, shape)]
        full = [piece for piece in saved if piece.tensor.numel()]
        kept = [piece for piece in saved if piece is not full[0]]
        missing = full[0].tensor.numel()
        with pytest.raises(ConfigError, match=f"{missing} of the elements of lost/w"):
            check_cover("lost/w", shape, [(piece.box, piece.flat) for piece in kept])
        if kept:
            kept = [Piece(p.name, p.shape, p.box, p.flat, p.tensor.float()) for p in kept]
            with pytest.raises(ConfigError, match=f"lacks {missing} of .* elements of lost/w"):
                assemble(kept)


def test_cover_agrees_with_counting() -> None:
    rng = random.Random(3)
    refused = 0
    for _ in range(1500):
        shape = random_shape(rng)
        places = partition(rng, shape)
        if rng.random() < 0.7:
            box = random_box(rng, shape)
            places[rng.randrange(len(places))] = (box, random_flat(rng, box))
        if rng.random() < 0.2:
            places += partition(rng, shape)[:1]
        counts = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=int)
        for box, flat in places:
            counts[elements(shape, box, flat)] += 1
        if (counts == 1).all():
            check_cover("w", shape, places)
        else:
            refused += 1
            with pytest.raises(ConfigError, match=" of w"):
                check_cover("w", shape, places)
    assert 300 < refused < 1400


def test_equal_count_with_a_gap_is_refused() -> None:
    rows = ((0, 4, 1), (0, 3, 1))
    with pytest.raises(ConfigError, match="two pieces hold the same elements of w"):
        check_cover("w", (4, 3), [(rows, (0, 6)), (((1, 4, 2), (0, 3, 1)), (0, 6))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_constructors(dtype: torch.dtype) -> None:
    tensor = torch.arange(35).reshape(7, 5).to(dtype)
    whole = Piece.whole("w", tensor.t())
    assert (whole.shape, whole.box, whole.flat) == ((5, 7), ((0, 5, 1), (0, 7, 1)), (0, 35))
    assert torch.equal(whole.tensor, tensor.t().reshape(-1))
    fragment = Piece.fragment("w", (7, 5), 11, tensor.reshape(-1)[11:20])
    assert (fragment.box, fragment.flat) == (((0, 7, 1), (0, 5, 1)), (11, 20))
    rows = [Piece.rows("w", (7, 5), first, 3, tensor[first::3]) for first in range(3)]
    assert (rows[1].box, rows[1].flat) == (((1, 7, 3), (0, 5, 1)), (0, 10))
    assert torch.equal(assemble(rows, flat=(11, 20)), fragment.tensor)


def test_ranks_without_rows_and_scalars() -> None:
    tensor = torch.rand(2, 3)
    rows = [Piece.rows("w", (2, 3), first, 4, tensor[first::4]) for first in range(4)]
    assert [piece.tensor.numel() for piece in rows] == [3, 3, 0, 0]
    check_cover("w", (2, 3), [(piece.box, piece.flat) for piece in rows])
    assert torch.equal(assemble(rows).reshape(2, 3), tensor)
    assert assemble([Piece.whole("count", torch.tensor(7))]).tolist() == [7]


def test_nan_payloads_and_signed_zeros_survive() -> None:
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, -0x80000000, 1, 0x7F800000, 5], dtype=torch.int32)
    tensor = bits.view(torch.float32).reshape(3, 2)
    rows = [Piece.rows("w", (3, 2), first, 2, tensor[first::2]) for first in range(2)]
    assert torch.equal(assemble(rows).view(torch.int32), bits)


@pytest.mark.parametrize(
    ("shape", "box", "flat", "numel"),
    [
        ((4,), ((0, 5, 1),), (0, 5), 5),
        ((4,), ((-1, 3, 1),), (0, 4), 4),
        ((4,), ((0, 4, 0),), (0, 4), 4),
        ((4,), ((0, 4, -1),), (0, 0), 0),
        ((4,), ((0, 4, 1),), (2, 5), 3),
        ((4,), ((0, 4, 1),), (3, 2), 0),
        ((4,), ((0, 4, 1),), (0, 4), 3),
        ((4, 4), ((0, 4, 1),), (0, 4), 4),
    ],
)
def test_coordinates_that_do_not_fit(shape: tuple[int, ...], box: Box, flat: Flat, numel: int) -> None:
    with pytest.raises(ConfigError, match="here/w"):
        Piece("here/w", shape, box, flat, torch.zeros(numel))


def test_tensors_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="1-D and contiguous"):
        Piece.fragment("w", (4,), 0, torch.zeros(4)[::2])
    with pytest.raises(ConfigError, match="rows of w"):
        Piece.rows("w", (4, 3), 0, 2, torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="wrong number of elements"):
        Piece.rows("w", (4, 3), 0, 2, torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="type"):
        Piece.whole("w", torch.zeros(2, dtype=torch.complex64))
    mixed = [Piece.fragment("w", (4,), 0, torch.zeros(2)), Piece.fragment("w", (4,), 2, torch.zeros(2).int())]
    with pytest.raises(ConfigError, match="another type"):
        assemble(mixed)


def test_overlapping_memory_is_copied_and_the_rest_is_not() -> None:
    buffer = torch.arange(10.0)
    views = {"a": buffer[2:6], "b": buffer[6:10], "c": buffer[3:5], "d": buffer[2:6], "e": buffer[:0]}
    apart = unshared(views)
    assert all(torch.equal(apart[key], views[key]) for key in views)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in apart.values() if t.numel())
    assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))
    assert apart["b"].data_ptr() == views["b"].data_ptr()
