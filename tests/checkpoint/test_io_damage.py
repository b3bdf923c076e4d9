"""Checkpoint folders that are damaged, foreign or forged."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.checkpoint.io import Checkpoint, find_auto
from megalowrank.errors import ConfigError
from tests.checkpoint.io_cases import rewrite_manifest, save_step, value_of, write_manifest


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
