"""Checkpoint folders: round trips, what they hold, and saves that fail."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.write import SoloRanks, save_checkpoint
from megalowrank.errors import TrainingError
from tests.checkpoint.io_cases import STATE, folders, save_step, save_together, value_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_saved_by_some_ranks_read_under_other_cuts(tmp_path: Path, dtype: torch.dtype, world: int) -> None:
    tensor = torch.randint(0, 100, (7, 5), generator=torch.Generator().manual_seed(world)).to(dtype)
    cuts = [35 * rank // world for rank in range(world + 1)]
    held = [
        [
            Piece.fragment("m/zero", (7, 5), cuts[rank], tensor.reshape(-1)[cuts[rank] : cuts[rank + 1]]),
            Piece.rows("m/rows", (7, 5), rank, world, tensor[rank::world]),
        ]
        for rank in range(world)
    ]
    held[-1].append(Piece.whole("m/whole", tensor))
    held[0].append(Piece.whole("m/empty", tensor[:0]))
    assert save_together(tmp_path, 120, held) == [tmp_path / "step_00000120"] * world
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.step, checkpoint.state) == (120, STATE)
    assert checkpoint.names() == ["m/empty", "m/rows", "m/whole", "m/zero"]
    assert checkpoint.read("m/empty").shape == (0,)
    for name in ("m/zero", "m/rows", "m/whole"):
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == ((7, 5), dtype)
        assert torch.equal(checkpoint.read(name), tensor.reshape(-1))
        for ways in range(1, 5):
            for rank in range(ways):
                box = ((rank, 7, ways), (0, 5, 1))
                assert torch.equal(checkpoint.read(name, box), tensor[rank::ways].reshape(-1))
        column = ((0, 7, 1), (1, 4, 2))
        assert torch.equal(checkpoint.read(name, column, (3, 11)), tensor[:, 1:4:2].reshape(-1)[3:11])


def test_what_a_folder_holds(tmp_path: Path) -> None:
    folder = save_step(tmp_path / "new" / "runs", 120)
    assert folders(folder) == ["manifest.json", "manifest.sha256", "rank_00000.safetensors"]
    assert folders(folder.parent) == ["latest", "step_00000120"]
    assert (folder.parent / "latest").read_text() == "step_00000120\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [manifest[key] for key in ("schema", "step", "world")] == [1, 120, 1]
    data = (folder / "rank_00000.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert manifest["files"] == [{"file": "rank_00000.safetensors", "sha256": digest, "bytes": len(data)}]
    assert manifest["tensors"]["count"] == {
        "shape": [],
        "dtype": "int64",
        "pieces": [{"file": "rank_00000.safetensors", "key": "count#1", "box": [], "flat": [0, 1]}],
    }
    modes = {(folder / name).stat().st_mode & 0o777 for name in folders(folder)}
    assert len(modes) == 1


def test_views_of_one_buffer_are_saved(tmp_path: Path) -> None:
    buffer = torch.arange(12.0, requires_grad=True)
    pieces = [Piece.whole("weight", buffer.view(3, 4)), Piece.fragment("master", (12,), 0, buffer)]
    save_checkpoint(tmp_path, 1, pieces, {}, SoloRanks())
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("weight"), checkpoint.read("master"))
    assert checkpoint.read("weight").tolist() == list(range(12))


def test_single_elements_of_any_stride_are_saved(tmp_path: Path) -> None:
    """One row for each of three ranks: a slice of one element is contiguous, whatever its stride."""
    tensor = torch.arange(3.0)
    held = [[Piece.rows("m", (3,), rank, 3, tensor[rank::3])] for rank in range(3)]
    assert held[0][0].tensor.stride() == (3,)
    assert save_together(tmp_path, 1, held) == [tmp_path / "step_00000001"] * 3
    assert torch.equal(Checkpoint.open(tmp_path).read("m"), tensor)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 5, fill=1)
    reader = Checkpoint.open(tmp_path)
    save_step(tmp_path, 5, fill=2)
    assert folders(tmp_path) == ["latest", "step_00000005"]
    assert value_of(Checkpoint.open(tmp_path)) == 2
    assert reader.state["value"] == 1


def test_keep_last(tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        save_step(tmp_path, step, keep_last=2)
    assert folders(tmp_path) == ["latest", "step_00000040", "step_00000050"]
    save_step(tmp_path, 60, keep_last=0)
    assert len(folders(tmp_path)) == 4
    save_step(tmp_path, 45, keep_last=2)
    assert folders(tmp_path) == ["latest", "step_00000040", "step_00000045"]
    assert value_of(Checkpoint.open(tmp_path)) == 45


def test_keep_every(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save_step(tmp_path, step, keep_last=2, keep_every=30)
    assert folders(tmp_path) == ["latest", "step_00000030", "step_00000060", "step_00000070"]
    save_step(tmp_path, 80, keep_last=2, keep_every=0)
    assert folders(tmp_path) == ["latest", "step_00000070", "step_00000080"]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_reads_back_differently_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """A disk that loses a bit between writing and reading back: the save fails on all ranks, latest stays."""
    save_step(tmp_path, 1)
    sync = os.fsync

    def losing(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        sync(handle)
        if name.endswith(f"rank_0000{rank}.safetensors"):
            flip_last_bit(Path(name))

    monkeypatch.setattr(os, "fsync", losing)
    halves = [[Piece.rows("w", (4, 2), part, 2, torch.full((2, 2), 3.0))] for part in (0, 1)]
    outcomes = save_together(tmp_path, 2, halves)
    assert [type(outcome) for outcome in outcomes] == [TrainingError, TrainingError]
    assert all("differs when read back" in str(outcome) for outcome in outcomes)
    assert folders(tmp_path) == ["latest", "step_00000001"]
    assert value_of(Checkpoint.open(tmp_path)) == 1


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_keep_last_removes_nothing_before_latest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    replace = os.replace

    def checked(source: Path, target: Path) -> None:
        assert folders(tmp_path)[-3:] == ["step_00000001", "step_00000002", "step_00000003"]
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    save_step(tmp_path, 3, keep_last=1)
    assert folders(tmp_path) == ["latest", "step_00000003"]


def test_leftovers_of_a_crash_are_cleared_and_other_files_are_not(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / ".step_00000002.tmp" / "rank_00000.safetensors").write_text("half")
    (tmp_path / ".mine.tmp").mkdir()
    (tmp_path / "log.txt").write_text("kept")
    save_step(tmp_path, 3)
    assert folders(tmp_path) == [".mine.tmp", "latest", "log.txt", "step_00000001", "step_00000003"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([Piece.fragment("half", (8,), 2, torch.zeros(6))], "two pieces hold the same elements of half"),
        ([Piece.whole("w", torch.zeros(4))], "two pieces hold the same elements of w"),
        ([Piece.fragment("gap", (4,), 1, torch.zeros(3))], "no rank holds 1 of the elements of gap"),
        ([Piece.fragment("half", (8,), 4, torch.zeros(4).half())], "ranks disagree on half"),
        ([Piece.fragment("half", (9,), 4, torch.zeros(5))], "ranks disagree on half"),
    ],
)
def test_pieces_that_do_not_make_up_tensors(tmp_path: Path, second: list[Piece], message: str) -> None:
    save_step(tmp_path, 1)
    first = [Piece.whole("w", torch.zeros(4)), Piece.fragment("half", (8,), 0, torch.zeros(4))]
    if all(piece.name != "half" for piece in second):
        first.pop()
    outcomes = save_together(tmp_path, 2, [first, second])
    assert all(isinstance(outcome, TrainingError) and message in str(outcome) for outcome in outcomes)
    assert folders(tmp_path) == ["latest", "step_00000001"]
    assert value_of(Checkpoint.open(tmp_path)) == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_with_a_full_disk_fails_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    save_step(tmp_path, 1)
    write = safetensors.torch.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write(tensors, path)
        if path.name == f"rank_{rank:05d}.safetensors":
            path.write_bytes(path.read_bytes()[:10])
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    held = [[Piece.whole(f"w{rank}", torch.zeros(3))] for rank in range(3)]
    outcomes = save_together(tmp_path, 2, held)
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert all(isinstance(outcome, TrainingError) for outcome in outcomes)
    assert f"rank {rank}: [Errno 28] No space left on device" in str(outcomes[0])
    assert folders(tmp_path) == ["latest", "step_00000001"]
    monkeypatch.undo()
    assert save_together(tmp_path, 2, held) == [tmp_path / "step_00000002"] * 3


def test_a_rank_file_cut_short_before_the_merge(tmp_path: Path) -> None:
    class Truncating(SoloRanks):
        def all_ok(self, ok: bool) -> bool:
            for path in tmp_path.glob(".step_*.tmp/rank_00000.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])
            return ok

    with pytest.raises(TrainingError, match="wrong size in bytes"):
        save_checkpoint(tmp_path, 1, [Piece.whole("w", torch.zeros(3))], {}, Truncating())
    assert folders(tmp_path) == []


def test_ranks_on_different_disks(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="rank_00001.json is missing; is the folder on a filesystem"):
        save_checkpoint(tmp_path, 1, [], {}, SoloRanks(world=2))


@pytest.mark.parametrize(("state", "error"), [({"a": {1: 2}}, TrainingError), ({"a": object()}, TypeError)])
def test_a_state_that_json_would_change(tmp_path: Path, state: dict, error: type[Exception]) -> None:
    outcomes = save_together(tmp_path / "root", 1, [[], []], state)
    assert isinstance(outcomes[0], error)
    assert isinstance(outcomes[1], TrainingError)
    assert not (tmp_path / "root").exists()
