"""What stands around a run: a rank that hangs or dies ends all of them, and the first error is the last one shown."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

import torch

from megalowrank.engine.watchdog import Watchdog
from megalowrank.errors import EXIT_FAILED, ConfigError, Stopped, TrainingError
from megalowrank.parallel.groups import Groups
from megalowrank.parallel.lookout import GRACE, Lookout

_ECHOES = ("connection", "gloo", "nccl", "peer", "socket", "timed out", "timeout")


class Guard:
    """A context around everything that ranks do together; every rank enters it. It ends the process groups.

    ``hang_timeout`` in seconds, 0 for none; ``folder`` takes the stacks of a rank that hangs.
    """

    def __init__(self, hang_timeout: float, folder: Path | None, groups: Groups) -> None:
        self.groups = groups
        self.lookout = Lookout(groups.rank, groups.world, self._on_failure)
        self.watchdog = Watchdog(hang_timeout, groups.rank, folder, self.lookout.fail)

    def __enter__(self) -> Guard:
        self.lookout.start(self.groups.everyone)
        self.watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error of this rank; end quietly if it only follows from the error of another one."""
        self.watchdog.close()
        if error is not None and not isinstance(error, Stopped):
            self._fail(error)
        self.lookout.close()
        if error is None or isinstance(error, Stopped):
            torch.distributed.destroy_process_group()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, (ConfigError, TrainingError)):
            self.lookout.fail(str(error))
            return
        if self.groups.world > 1 and _is_echo(error) and self.lookout.wait(GRACE):
            self.lookout.leave()
        if not isinstance(error, Exception):
            self.lookout.fail(type(error).__name__)
            return
        traceback.print_exception(error)
        sys.stderr.flush()
        self.lookout.fail(f"{type(error).__name__}: {error}")
        self.lookout.close()
        os._exit(EXIT_FAILED)

    def _on_failure(self, verdict: str) -> None:
        if " hung: " in verdict:
            self.watchdog.show(verdict)


def _is_echo(error: BaseException) -> bool:
    """Whether a collective failed, which the death of another rank causes; torch may have hidden that in another."""
    causes = [cause for cause in (error, error.__context__) if isinstance(cause, RuntimeError)]
    return any(word in str(cause).lower() for cause in causes for word in _ECHOES)
