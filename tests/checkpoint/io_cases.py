"""Saving and reading small checkpoints, for the tests of checkpoint folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.write import Retention, SoloRanks, save_checkpoint

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


def save_step(root: Path, step: int, keep_last: int = 0, fill: int | None = None, keep_every: int = 0) -> Path:
    """One process saves tensors filled with the step (or ``fill``)."""
    value = step if fill is None else fill
    pieces = [
        Piece.whole("weight/w", torch.full(SHAPE, float(value))),
        Piece.whole("count", torch.tensor(value)),
    ]
    return save_checkpoint(root, step, pieces, {"value": value}, SoloRanks(), Retention(keep_last, keep_every))


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
