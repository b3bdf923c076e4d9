"""Checkpoint folders: round trips, damage, malice, crashes at every write, and kill -9."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megalowrank.checkpoint.io import Checkpoint, SoloRanks, find_auto, save_checkpoint
from megalowrank.checkpoint.pieces import Piece
from megalowrank.errors import ConfigError, TrainingError

SHAPE = (6, 4)
STATE = {"config": {"lr": 1e-3, "none": None}, "rng": [1, 2**63], "note": "é", "done": False}


class Team:
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.said: dict[int, bool] = {}
        self.gate = threading.Barrier(world, timeout=20)

    def member(self, rank: int) -> ThreadRanks:
        return ThreadRanks(rank, self)


class ThreadRanks:
    def __init__(self, rank: int, team: Team) -> None:
        self.rank, self.world, self.team = rank, team.world, team

    def barrier(self) -> None:
        self.team.gate.wait()

    def all_ok(self, ok: bool) -> bool:
        self.team.said[self.rank] = ok
        self.team.gate.wait()
        answer = all(self.team.said.values())
        self.team.gate.wait()
        return answer


def save_together(root: Path, step: int, held: list[list[Piece]], state: Any = None) -> list[object]:
    """What the save returned or raised on each of len(held) ranks."""
    team = Team(len(held))
    outcomes: list[object] = [None] * len(held)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = save_checkpoint(root, step, held[rank], state or STATE, team.member(rank))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(held))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def save_step(root: Path, step: int, keep_last: int = 0, fill: int | None = None) -> Path:
    """One process saves tensors filled with the step (or ``fill``)."""
    value = step if fill is None else fill
    pieces = [
        Piece.whole("weight/w", torch.full(SHAPE, float(value))),
        Piece.whole("count", torch.tensor(value)),
    ]
    return save_checkpoint(root, step, pieces, {"value": value}, SoloRanks(), keep_last)


def value_of(checkpoint: Checkpoint) -> int:
    """The number the checkpoint was filled with, after checking that all of it agrees."""
    value = checkpoint.state["value"]
    assert torch.equal(checkpoint.read("weight/w"), torch.full((24,), float(value)))
    assert checkpoint.read("count").tolist() == [value]
    return value


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its hash right again, as an attacker can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, json.dumps(manifest).encode())


def write_manifest(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")


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


def damage_flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def damage_cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def damage_remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def damage_zero(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_remove, damage_zero])
@pytest.mark.parametrize("file", ["manifest.json", "manifest.sha256", "rank_00000.safetensors"])
def test_damage_is_found_and_the_one_before_is_named(
    tmp_path: Path, file: str, damage: Callable[[Path, random.Random], None]
) -> None:
    rng = random.Random(f"{file} {damage.__name__}")
    for step in (40, 80, 120):
        save_step(tmp_path, step)
    shutil.copytree(tmp_path, tmp_path / "good")
    for _ in range(25):
        shutil.rmtree(tmp_path / "step_00000120")
        shutil.copytree(tmp_path / "good" / "step_00000120", tmp_path / "step_00000120")
        damage(tmp_path / "step_00000120" / file, rng)
        if is_harmless(tmp_path, file):
            continue
        for path in (tmp_path, tmp_path / "step_00000120"):
            with pytest.raises(ConfigError, match=rf"{file}.*the one before is step_00000080$"):
                Checkpoint.open(path)
        found, refused = find_auto(tmp_path)
        assert found == tmp_path / "step_00000080"
        assert len(refused) == 1 and file in refused[0]
    assert value_of(Checkpoint.open(tmp_path / "step_00000080")) == 80


def is_harmless(root: Path, file: str) -> bool:
    """Bits after the hash in manifest.sha256, which is the name that sha256sum wants, mean nothing."""
    if file != "manifest.sha256" or not (root / "step_00000120" / file).exists():
        return False
    good = (root / "good" / "step_00000120" / file).read_bytes().split()[0]
    return (root / "step_00000120" / file).read_bytes().split()[:1] == [good]


def test_damage_without_verify_is_still_an_error_and_never_a_traceback(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    file = folder / "rank_00000.safetensors"
    good = file.read_bytes()
    for index in range(120):
        file.write_bytes(good[:index] + bytes([good[index] ^ 0x55]) + good[index + 1 :])
        try:
            checkpoint = Checkpoint.open(tmp_path, verify=False)
            assert checkpoint.read("weight/w").shape == (24,)
        except ConfigError as error:
            assert "\n" not in str(error)
        with pytest.raises(ConfigError, match="hash does not match"):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", [b"", b"step_00000999\n", b"../elsewhere", b"\x80\x04K\x01.", b"step_1"])
def test_a_bad_latest(tmp_path: Path, text: bytes) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "latest").write_bytes(text)
    with pytest.raises(ConfigError, match="(latest|step_00000999).*the one before is step_00000002$"):
        Checkpoint.open(tmp_path)
    assert find_auto(tmp_path)[0] == tmp_path / "step_00000002"
    (tmp_path / "latest").unlink()
    found, refused = find_auto(tmp_path)
    assert found == tmp_path / "step_00000002"
    assert refused == (f"{tmp_path / 'latest'} is missing",)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path / "foreign", tmp_path / "none", tmp_path / "foreign" / "pytorch_model.bin"):
        with pytest.raises(ConfigError, match="is not a checkpoint|there is no checkpoint folder"):
            Checkpoint.open(path)
        assert find_auto(path) == (None, ())


def edit_version(manifest: dict[str, Any]) -> None:
    manifest["schema"] = 2


def edit_traversal(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["file"] = "../step_00000001/rank_00000.safetensors"


def edit_absolute(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["file"] = "/etc/passwd"


def edit_unlisted(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["count"]["pieces"][0]["file"] = "../../rank_00000.safetensors"


def edit_no_state(manifest: dict[str, Any]) -> None:
    del manifest["state"]


def edit_dtype(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["count"]["dtype"] = "load"


def edit_box(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["weight/w"]["pieces"][0]["box"] = [[0, 6, 1], [0, "4", 1]]


def edit_shape(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["weight/w"]["shape"] = [10**9, 10**9]


def edit_files(manifest: dict[str, Any]) -> None:
    manifest["files"] = [["rank_00000.safetensors"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_version, "schema this version does not read; got 2; allowed: 1"),
        (edit_traversal, "names a file it must not"),
        (edit_absolute, "names a file it must not"),
        (edit_unlisted, "not in its list"),
        (edit_no_state, "not a checkpoint manifest"),
        (edit_dtype, "not a checkpoint manifest"),
        (edit_box, "not a checkpoint manifest"),
        (edit_shape, "weight/w"),
        (edit_files, "not a checkpoint manifest"),
    ],
)
def test_a_forged_manifest(tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    save_step(tmp_path, 1)
    rewrite_manifest(save_step(tmp_path, 2), edit)
    with pytest.raises(ConfigError, match=f"{message}.*the one before is step_00000001$"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", [b"not json", b"[" * 100_000, b"[1]", b"null", b"\xff\xfe", b"9" * 5000])
def test_a_manifest_that_is_not_one(tmp_path: Path, text: bytes) -> None:
    write_manifest(save_step(tmp_path, 1), text)
    with pytest.raises(ConfigError, match="is not JSON|schema this version does not read"):
        Checkpoint.open(tmp_path)


def test_a_forged_key_or_type_is_refused_when_read(tmp_path: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["count"]["pieces"][0]["key"] = "weight/w#0"
        manifest["tensors"]["weight/w"]["dtype"] = "int32"

    rewrite_manifest(save_step(tmp_path, 1), edit)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match="not what the manifest says"):
        checkpoint.read("count")
    with pytest.raises(ConfigError, match="weight/w has another type"):
        checkpoint.read("weight/w")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "file", ["latest", "manifest.json", "manifest.sha256", "rank_00000.safetensors", "as torch.save"]
)
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, file: str) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps({"weight/w": Bomb(marker)})
    pickle.loads(payload)
    marker.rmdir()  # raises unless the payload works
    save_step(tmp_path, 1)
    folder = save_step(tmp_path, 2)
    target = tmp_path / "latest" if file == "latest" else folder / file
    if file == "as torch.save":
        target = folder / "rank_00000.safetensors"
        torch.save({"weight/w": Bomb(marker)}, target)
    else:
        target.write_bytes(payload)
    with pytest.raises(ConfigError, match=target.name):
        Checkpoint.open(tmp_path)
    if target.name.endswith("safetensors"):
        data = target.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        rewrite_manifest(folder, lambda it: it["files"][0].update(bytes=len(data), sha256=digest))
        checkpoint = Checkpoint.open(tmp_path)
        with pytest.raises(ConfigError, match="cannot read .*rank_00000.safetensors"):
            checkpoint.read("weight/w")
    if file == "manifest.json":
        write_manifest(folder, payload)
        with pytest.raises(ConfigError, match="manifest.json is not JSON"):
            Checkpoint.open(tmp_path)
    find_auto(tmp_path)
    save_step(tmp_path, 3)
    assert not marker.exists()


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    checkpoint = Checkpoint.open(tmp_path / "step_00000001")
    with pytest.raises(ConfigError, match="no tensor weight/v; allowed: weight/w"):
        checkpoint.read("weight/v")
    with pytest.raises(ConfigError, match="leaves its shape"):
        checkpoint.read("weight/w", ((0, 7, 1), (0, 4, 1)))
    with pytest.raises(ConfigError, match="leaves its box"):
        checkpoint.read("weight/w", flat=(0, 25))


def test_find_auto_order(tmp_path: Path) -> None:
    assert find_auto(tmp_path / "none") == (None, ())
    assert find_auto(tmp_path) == (None, ())
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert find_auto(tmp_path) == (tmp_path / "step_00000003", ())
    save_step(tmp_path, 2, fill=22)  # went back to step 2: what followed the old one is not newest
    assert find_auto(tmp_path) == (tmp_path / "step_00000002", ())
    for step in (2, 1):
        damage_cut(tmp_path / f"step_0000000{step}" / "manifest.json", random.Random(0))
    found, refused = find_auto(tmp_path)
    assert found == tmp_path / "step_00000003"
    assert ["step_00000002" in refused[0], "step_00000001" in refused[1]] == [True, True]
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    assert find_auto(tmp_path)[0] is None and len(find_auto(tmp_path)[1]) == 3


class Crash(BaseException):
    """The process is gone: nothing catches this, so nothing is cleaned up."""


class Saboteur:
    """Counts every call that changes the disk and fails at a chosen one, before or after its effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, late: bool, error: BaseException) -> None:
        self.calls, self.at, self.late, self.error = 0, at, late, error
        targets: list[tuple[Any, str]] = [
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (safetensors.torch, "save_file"),
        ]
        targets += [(Path, name) for name in ("write_text", "unlink", "mkdir", "chmod")]
        targets += [(shutil, "rmtree")]
        for owner, name in targets:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: Any, **kwargs: Any) -> object:
            self.calls += 1
            if self.calls == self.at and self.late:
                call(*args, **kwargs)
            if self.calls == self.at:
                raise self.error
            return call(*args, **kwargs)

        return counted


def every_failure(scenario: Callable[[Path], object], tmp_path: Path, error: BaseException) -> Iterator[Path]:
    """A root with steps 1 and 2 for each disk call of the scenario, after the scenario failed there."""
    at = 0
    while True:
        at += 1
        for late in (False, True):
            root = tmp_path / f"{at}{late}"
            save_step(root, 1)
            save_step(root, 2)
            with pytest.MonkeyPatch.context() as monkeypatch:
                saboteur = Saboteur(monkeypatch, at, late, error)
                try:
                    scenario(root)
                except (Crash, TrainingError):
                    assert saboteur.calls >= at
            if saboteur.calls < at:
                assert at > 12
                return
            yield root


def save_new(root: Path) -> None:
    save_step(root, 3, keep_last=2)


def save_same(root: Path) -> None:
    save_step(root, 2, fill=22)


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")], ids=["crash", "full"])
@pytest.mark.parametrize(("scenario", "new"), [(save_new, 3), (save_same, 22)])
def test_a_failure_at_any_write_leaves_a_checkpoint(
    tmp_path: Path, scenario: Callable[[Path], object], new: int, error: BaseException
) -> None:
    values = []
    for root in every_failure(scenario, tmp_path, error):
        name = (root / "latest").read_text().strip()
        value = value_of(Checkpoint.open(root))
        values.append(value)
        assert value in (2, new)
        assert name == ("step_00000003" if value == 3 else "step_00000002")
        assert value_of(Checkpoint.open(root / name)) == value
        found, refused = find_auto(root)
        assert (found, refused) == (root / name, ())
        for folder in root.glob("step_*"):
            value_of(Checkpoint.open(folder))
        save_step(root, 4)
        assert value_of(Checkpoint.open(root)) == 4
        assert not [name for name in folders(root) if name.startswith(".")]
        assert value_of(Checkpoint.open(root / "step_00000002")) in (2, 22)
    assert values[0] == 2 and values[-1] == new


def test_fsync_comes_before_each_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(owner: Any, name: str, label: Callable[..., str]) -> None:
        call = getattr(owner, name)

        def noted(*args: Any) -> object:
            events.append(label(*args))
            return call(*args)

        monkeypatch.setattr(owner, name, noted)

    note(os, "fsync", lambda handle: "sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    note(os, "rename", lambda source, target: f"rename {Path(target).name}")
    note(os, "replace", lambda source, target: f"rename {Path(target).name}")
    save_step(tmp_path, 1)
    named, latest = events.index("rename step_00000001"), events.index("rename latest")
    synced = {"rank_00000.safetensors", "manifest.json", "manifest.sha256", ".step_00000001.tmp"}
    assert {f"sync {name}" for name in synced} <= set(events[:named])
    assert f"sync {tmp_path.name}" in events[named:latest]
    assert "sync .latest.tmp" in events[named:latest]
    assert f"sync {tmp_path.name}" in events[latest:]


def save_until_killed(root: Path, first: int, line: Connection) -> None:
    """Run in a process of its own: save, sometimes the same step twice, and tell what is done."""
    torch.set_num_threads(1)
    line.send(0)
    for count in range(first, first + 10_000):
        save_step(root, count // 2, keep_last=2, fill=count)
        line.send(count)


def test_kill_nine_at_random_moments(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megalowrank.checkpoint.io"])
    rng = random.Random(9)
    done = 0
    for _ in range(15):
        near, far = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(tmp_path, done + 1, far))
        process.start()
        far.close()
        near.recv()
        time.sleep(rng.uniform(0.005, 0.08))
        process.kill()
        process.join()
        try:
            while True:
                done = max(done, near.recv())
        except EOFError:
            near.close()
        if done:
            value = value_of(Checkpoint.open(tmp_path))
            assert value in (done, done + 1)
            found, refused = find_auto(tmp_path)
            assert found is not None and refused == ()
            assert [value_of(Checkpoint.open(folder)) for folder in tmp_path.glob("step_*")]
            done = value
    assert done > 15
