"""What is in a checkpoint, whether it is intact, and how two of them differ.

    python tools/inspect_checkpoint.py runs/350m                      the one that `latest` names
    python tools/inspect_checkpoint.py runs/350m --all                all of the folder
    python tools/inspect_checkpoint.py runs/350m/step_00002000 --tensors 'master/*.mlp.*'
    python tools/inspect_checkpoint.py runs/one runs/other            compared tensor by tensor

Hashes of all files are verified first, which reads them whole; tensors are read a few million elements at a time.
Exit code 0: intact, and equal where two are compared; 1: damaged (the message names the file) or different; 2: a
mistake in the command line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inspecting.compare import compare
from inspecting.facts import facts, matching, statistics
from inspecting.text import comparison_text, facts_text, list_text, tensors_text

from megalowrank.checkpoint.folder import STEP, read_latest, steps
from megalowrank.checkpoint.io import Checkpoint
from megalowrank.errors import EXIT_FAILED, ConfigError, run_main


class DamagedError(Exception):
    """A checkpoint cannot be read as it was written."""


def open_checkpoint(path: Path, verify: bool) -> Checkpoint:
    """ConfigError if there is no checkpoint, DamagedError if there is one that is not intact."""
    there = path.is_dir() and (STEP.fullmatch(path.name) or (path / "manifest.json").exists() or is_root(path))
    if not there:
        raise ConfigError("this is no checkpoint and no folder of them", path)
    try:
        return Checkpoint.open(path, verify)
    except ConfigError as error:
        raise DamagedError(str(error)) from None


def is_root(path: Path) -> bool:
    """Whether a folder holds checkpoints, or did."""
    return (path / "latest").exists() or bool(steps(path))


def show(path: Path, verify: bool, pattern: str | None) -> tuple[dict[str, Any], str, bool]:
    """One checkpoint, with the tensors that match ``pattern``."""
    checkpoint = open_checkpoint(path, verify)
    found = facts(checkpoint, verify)
    text = facts_text(found)
    if pattern is not None:
        found["tensors"] = {name: statistics(checkpoint, name) for name in matching(checkpoint, pattern)}
        text += "\n\n" + tensors_text(found["tensors"])
    return found, text, True


def show_all(path: Path, verify: bool) -> tuple[dict[str, Any], str, bool]:
    """All checkpoints of a folder, newest first; a damaged one is an entry with its ``error``."""
    if not path.is_dir() or not is_root(path):
        raise ConfigError("--all needs a folder of checkpoints", path)
    try:
        latest = read_latest(path)
    except ConfigError as error:
        latest = f"none: {error}"
    entries: list[dict[str, Any]] = []
    for name in steps(path):
        try:
            opened = Checkpoint.open(path / name, verify)
            size = sum(opened.files.values())
            entries.append({"name": name, "latest": name == latest, "ranks": len(opened.files), "bytes": size})
        except ConfigError as error:
            entries.append({"name": name, "latest": name == latest, "error": str(error)})
    intact = STEP.fullmatch(latest) is not None and not any("error" in entry for entry in entries)
    found = {"folder": str(path), "latest": latest, "verified": verify, "intact": intact, "checkpoints": entries}
    return found, list_text(found), intact


def show_difference(one: Path, other: Path, verify: bool) -> tuple[dict[str, Any], str, bool]:
    """Two checkpoints compared."""
    found = compare(open_checkpoint(one, verify), open_checkpoint(other, verify))
    return found, comparison_text(found), found["equal"]


def inspected(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    """What was asked for as JSON and as text, and whether all is well."""
    if args.other is not None and (args.all or args.tensors is not None):
        raise ConfigError("two checkpoints are compared without --all and --tensors")
    if args.all and args.tensors is not None:
        raise ConfigError("--all lists checkpoints, --tensors shows one")
    try:
        if args.other is not None:
            return show_difference(args.path, args.other, args.verify)
        return show_all(args.path, args.verify) if args.all else show(args.path, args.verify, args.tensors)
    except DamagedError as error:
        return {"error": str(error)}, f"damaged: {error}", False


def main() -> None:
    """Command line of ``inspect_checkpoint``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder of them: the one that latest names")
    parser.add_argument("other", type=Path, nargs="?", help="another one to compare with")
    parser.add_argument("--all", action="store_true", help="list all checkpoints of a folder")
    parser.add_argument("--tensors", nargs="?", const="*", metavar="PATTERN", help="show the values of tensors")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compute hashes, only sizes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    found, text, well = inspected(args)
    damaged = "error" in found
    print(json.dumps(found, indent=1) if args.json else text, file=sys.stderr if damaged and not args.json else None)
    if not well:
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run_main(main)
