"""Ends a process by SIGKILL at a chosen write point of its first save.

Write points are the moments between two changes of the disk: after one is before the next, and after the last is the
end of the save. Within a change that writes a whole file there is another one, when half of it is there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from megalowrank.engine import saving

Call = Callable[..., Any]
_OWNED_BY_OS = ("rename", "replace", "fsync", "unlink", "rmdir")
_OWNED_BY_PATH = ("unlink", "mkdir", "chmod")


class Saboteur:
    """Counts write points from 1 in the first save of this process and kills it at number ``at``.

    A save with fewer points kills it when it is over. ``note`` gets JSON: ``point``, where that was and whether the
    save was ``over``.
    """

    def __init__(self, at: int, note: Path) -> None:
        self.at, self.note = at, note
        self.count = 0
        self._thread: int | None = None
        self._inside = False

    def install(self) -> None:
        """From now on the calls that change the disk are watched."""
        for name in _OWNED_BY_OS:
            setattr(os, name, self._wrap(getattr(os, name)))
        for name in _OWNED_BY_PATH:
            setattr(Path, name, self._wrap(getattr(Path, name)))
        write_text: Call = Path.write_text
        setattr(Path, "write_text", self._wrap(write_text, _half_written(write_text)))  # noqa: B010
        save_file: Call = safetensors.torch.save_file
        setattr(safetensors.torch, "save_file", self._wrap(save_file, _half_saved(save_file)))  # noqa: B010
        setattr(saving, "save_checkpoint", self._watched(saving.save_checkpoint))  # noqa: B010

    def _watched(self, save: Call) -> Call:
        """``save`` with its points counted, and death when it returns."""

        def watched(*args: Any, **kwargs: Any) -> None:
            self._thread = threading.get_ident()
            save(*args, **kwargs)
            self._die("the end of the save", over=True)

        return watched

    def _wrap(self, call: Call, half: Call | None = None) -> Call:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self._thread != threading.get_ident():
                return call(*args, **kwargs)
            self._inside = True
            try:
                return self._step(call, half, args, kwargs)
            finally:
                self._inside = False

        return counted

    def _step(self, call: Call, half: Call | None, args: Any, kwargs: Any) -> Any:
        files = [arg for arg in args if isinstance(arg, Path)] or args[:1]
        what = f"{call.__name__} {' '.join(map(_file_name, files))}"
        if self._reached():
            self._die(f"before {what}")
        if half is not None and self._reached():
            half(*args, **kwargs)
            self._die(f"halfway through {what}")
        return call(*args, **kwargs)

    def _reached(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _die(self, where: str, over: bool = False) -> None:
        with self.note.open("w") as file:
            json.dump({"point": re.sub(r"\d{5,}", "N", where), "over": over}, file)
        os.kill(os.getpid(), signal.SIGKILL)


def _file_name(file: int | str | Path) -> str:
    """The name of a file that is given by its path or by an open handle."""
    return Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file).name


def _half_written(write_text: Call) -> Call:
    return lambda path, text, **more: write_text(path, text[: len(text) // 2], **more)


def _half_saved(save_file: Call) -> Call:
    def half_saved(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    return half_saved
