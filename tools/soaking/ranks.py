"""Ranks of a run, each a fork of a process that has imported everything: a run starts in a fraction of a second.

The process that forks must have no threads and no process group.
"""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from soaking.sabotage import Saboteur

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_llama.py"


class Job:
    """One run of the program on ``world`` ranks, started; ``folder`` takes what each rank prints."""

    def __init__(self, flags: Sequence[str], world: int, folder: Path, saboteurs: dict[int, Saboteur]) -> None:
        self.folder = folder
        self.codes: dict[int, int] = {}
        port = str(_port())
        self.processes = {rank: self._fork(rank, world, port, flags, saboteurs.get(rank)) for rank in range(world)}

    def kill(self, rank: int) -> None:
        """kill -9, unless it has ended."""
        if rank not in self.codes:
            os.kill(self.processes[rank], signal.SIGKILL)

    def poll(self) -> bool:
        """Whether all have ended; ``codes`` has their exit codes (a signal's number negative)."""
        for rank, process in self.processes.items():
            if rank not in self.codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                self.codes.update({rank: os.waitstatus_to_exitcode(status)} if ended else {})
        return len(self.codes) == len(self.processes)

    def wait(self, seconds: float, after_death: float | None = None) -> bool:
        """Wait for all; False if some had to be killed: after ``seconds``, or ``after_death`` that of another."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if after_death is not None and self.codes:
                deadline, after_death = min(deadline, time.monotonic() + after_death), None
            if time.monotonic() > deadline:
                return self._end()
            time.sleep(0.01)
        return True

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait for something; False if all ranks have ended before it."""
        while not reached():
            if self.poll():
                return False
            time.sleep(0.005)
        return True

    def output(self, *ranks: int) -> str:
        """What these ranks have printed, or all of them, one after the other."""
        return "".join(self._log(rank).read_text() for rank in ranks or self.processes)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def _end(self) -> bool:
        for rank in self.processes:
            self.kill(rank)
        while not self.poll():
            time.sleep(0.01)
        return False

    def _fork(self, rank: int, world: int, port: str, flags: Sequence[str], saboteur: Saboteur | None) -> int:
        self._log(rank).write_text("")
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            handle = os.open(self._log(rank), os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if saboteur is not None:
                saboteur.install()
            sys.argv = [PROGRAM.name, *flags]
            code = _run()
        finally:
            os._exit(code)


def _port() -> int:
    """A TCP port that is free, and not of those that the system gives to whoever connects to something."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _run() -> int:
    """The program as the interpreter would run it."""
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
