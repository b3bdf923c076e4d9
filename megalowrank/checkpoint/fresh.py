"""A folder that is whole or not there: filled beside its place and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megalowrank.checkpoint.folder import fsync
from megalowrank.errors import ConfigError, TrainingError


@contextlib.contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` at the end, synced; after an error nothing is left.

    Raises ConfigError if ``out`` exists or its parent cannot be written, TrainingError if the disk fails on the way.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise ConfigError("the output exists", out, "a folder that does not")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("cannot write the output folder", f"{out}: {error.strerror}") from None
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            fsync(path)
        fsync(temporary)
        os.rename(temporary, out)
        fsync(out.parent)
    except OSError as error:
        raise TrainingError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
