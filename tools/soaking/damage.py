"""Damaged files of checkpoints: refused by name, the one before is taken, and never a good exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalowrank.checkpoint.folder import number, steps
from megalowrank.errors import EXIT_MISTAKE
from soaking.story import Story


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path: Path) -> None:
    """Leave nothing of a file."""
    path.unlink()


Damage = Callable[[Path], None]
FILES = ("rank_00001.safetensors", "manifest.json", "rank_00000.safetensors", "manifest.sha256")
CASES: list[tuple[str, Damage]] = [(file, damage) for damage in (flip, cut, remove) for file in FILES]


def damaged_newest(story: Story, file: str, damage: Damage) -> None:
    """With ``file`` of the newest checkpoint damaged: exit 2 for that one, and --load auto goes on from another."""
    newest, before = steps(story.saved)[:2]
    folder = story.saved / newest
    damage(folder / file)
    story.ends_with(EXIT_MISTAKE, str(folder), file, f"the one before is {before}", load=str(folder))
    story.ends_with(0, f"not resumed: {folder}", file, f"resumed at update {number(before)} (")


def damaged_all(story: Story) -> None:
    """With every checkpoint damaged there is nothing to load, which is a mistake and not a fresh start."""
    for name in steps(story.saved):
        flip(story.saved / name / "manifest.json")
    story.ends_with(EXIT_MISTAKE, "--load auto finds no intact checkpoint")
    story.ends_with(EXIT_MISTAKE, "manifest.json", load=str(story.saved))
