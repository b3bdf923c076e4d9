"""Run in a process of its own, to be killed: preprocessing of a job that a JSON file describes.

``python -m tests.data.preprocess_cases JOB.json``. The process kills itself with signal 9 after "kill_after"
finished parts, or instead of its "kill_move"-th move of a file or removal of a folder. With "pause" every document
takes that many seconds. Prints the peaks of memory in KiB, of itself and of its largest worker.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalowrank.data import files, index
from megalowrank.data.parts import Progress
from megalowrank.data.preprocess import Job, preprocess
from megalowrank.data.sources import JsonLines, Part


@dataclass(frozen=True)
class SlowLines(JsonLines):
    """JSON lines that take their time."""

    pause: float = 0.0

    def read(self, part: Part) -> Iterator[str]:
        for text in super().read(part):
            time.sleep(self.pause)
            yield text


def kill_at_move(number: int) -> None:
    """Moves of this process: plan, .bin, .sizes, .idx, manifest, and then the removal of the parts."""
    replace, rmtree, moves = os.replace, shutil.rmtree, iter(range(1, 100))

    def counted(action: Callable[..., None], *arguments: Any) -> None:
        if next(moves) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        action(*arguments)

    os.replace = lambda *arguments: counted(replace, *arguments)
    shutil.rmtree = lambda *arguments: counted(rmtree, *arguments)  # type: ignore[assignment]


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())

    def progress(state: Progress) -> None:
        if "kill_after" in case and state.parts >= case["kill_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    files.BLOCK, index._STEP = case.get("block", files.BLOCK), case.get("block", index._STEP)
    if "kill_move" in case:
        kill_at_move(case["kill_move"])
    source = SlowLines(case["input"], pause=case.get("pause", 0.0))
    job = Job([source], case["prefix"], case["tokenizer"], part_bytes=case["part_bytes"], workers=case["workers"])
    preprocess(job, progress)
    own = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps([int(own[1]) if own else 0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))


if __name__ == "__main__":
    main()
