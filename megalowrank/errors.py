"""The errors a user can cause, kept apart from the errors that are ours."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable

EXIT_FAILED = 1  # the run cannot go on
EXIT_MISTAKE = 2  # a mistake in flags, files or input: running it again does not help
EXIT_STOPPED = 75  # a signal ended the run, which is saved: the same command with --load auto goes on
EXIT_HUNG = 76  # nothing happened for --hang-timeout seconds
EXIT_PEER = 77  # another rank ended badly
_OTHERS_WAIT = 5.0


class ConfigError(Exception):
    """A mistake in flags, configuration files or input data.

    The message is one line: what is wrong, what was given, what is allowed.
    Command-line programs print it and leave with exit code 2.
    """

    def __init__(self, what: str, got: object = None, allowed: object = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        super().__init__("; ".join(parts))


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of ``known``; it says which one is close."""
    names = list(known)
    hint = nearest(name, names)
    return ConfigError(what, repr(name), ", ".join(names) + (f" (did you mean {hint}?)" if hint else ""))


class TrainingError(Exception):
    """A run that cannot go on (too many non-finite steps, for instance); exit code 1."""


class Stopped(Exception):
    """A signal asked the run to end between two updates, and what it had done is saved; exit code 75."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, for 'did you mean'; None if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None


def run_main(main: Callable[[], None]) -> None:
    """Run a command-line program: user errors become one line and exit code 2.

    Called by every rank. A rank other than the first waits before it prints: if the first failed too, the
    launcher has ended this one by then, so that a common mistake is one line and a local one is not lost.
    """
    try:
        main()
    except ConfigError as error:
        _leave(f"error: {error}", EXIT_MISTAKE)
    except TrainingError as error:
        _leave(f"stopped: {error}", EXIT_FAILED)
    except Stopped as error:
        if _rank() == "0":
            print(error, flush=True)
        sys.exit(EXIT_STOPPED)


def _leave(line: str, code: int) -> None:
    rank = _rank()
    if rank != "0":
        time.sleep(_OTHERS_WAIT)
        line = f"rank {rank}: {line}"
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
