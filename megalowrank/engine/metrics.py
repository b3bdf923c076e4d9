"""``metrics.jsonl``, one JSON object per line, and the progress that a person sees."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from megalowrank.data.files import write_whole
from megalowrank.errors import ConfigError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; numbers that were not finite are None.

    A last line that was cut while it was written is left out. Raises ConfigError, naming file and line, for
    anything else that is not a JSON object with an integer ``step``.
    """
    return [record for record, _ in _records(Path(path))]


class Sink(Protocol):
    """Where the records of a run go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record; it has an int ``step``."""

    def truncate_from(self, step: int) -> None:
        """Forget the records of ``step`` and later, which a resumed run writes again; called once, before writing."""

    def close(self) -> None:
        """Everything is written."""


class MetricsWriter:
    """Appends records to a metrics file; does nothing without ``path`` or where ``is_main`` is false.

    A line is complete and handed to the system before ``write`` returns. Raises ConfigError if the file cannot
    be written, or holds something else.
    """

    def __init__(self, path: Path | None, is_main: bool) -> None:
        self.path = Path(path) if path is not None and is_main else None
        self._file: IO[str] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``; it has an int ``step``. Numbers may be scalar tensors; NaN and inf become null."""
        if self.path is None:
            return
        line = json.dumps(plain(record), allow_nan=False)
        if self._file is None:
            self._keep(math.inf)
            self._file = self._open()
        self._file.write(line + "\n")
        self._file.flush()

    def truncate_from(self, step: int) -> None:
        """Drop the records of ``step`` and later, which a resumed run writes again; all at once or not at all."""
        if self.path is not None:
            self.close()
            self._keep(step)

    def close(self) -> None:
        """Close the file; a later ``write`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None

    def _keep(self, limit: float) -> None:
        """Rewrite the file with the records before ``limit``, if that changes it."""
        assert self.path is not None
        if not self.path.exists():
            return
        text = "".join(line + "\n" for record, line in _records(self.path) if record["step"] < limit)
        if self.path.read_bytes() == text.encode():
            return
        replace_text(self.path, text)


def replace_text(path: Path, text: str) -> None:
    """Give a file this content, all at once or not at all; ConfigError if that cannot be done."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every record with its line, without a last one that was cut."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        if last and not line:
            return
        record = _parse(line)
        if record is not None:
            yield record, line.decode()
        elif not last:
            raise ConfigError(
                f"{path} line {number} is not a record of a run", repr(line[:40].decode(errors="replace"))
            )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as JSON has it: scalars of torch and numpy as numbers, None for what is not finite."""
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar on a terminal; elsewhere one plain line per report. Silent where ``is_main`` is false.

    ``total`` and ``start`` count updates: of the whole run, and done before this process.
    """

    def __init__(self, total: int, start: int, is_main: bool, stream: IO[str] | None = None) -> None:
        self.total, self.start, self.done = total, start, start
        self._stream = stream or sys.stdout
        self._active, self._begin = is_main, time.monotonic()
        self._bar = None
        if is_main and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, unit="update", file=self._stream, dynamic_ncols=True)

    def advance(self, updates: int = 1) -> None:
        """``updates`` more are done."""
        self.done += updates
        if self._bar is not None:
            self._bar.update(updates)

    def report(self, loss: float, tokens_per_second: float) -> None:
        """Show mean loss and speed; called every log interval."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s")
        else:
            left = f"ETA {_clock(self._seconds_left())}"
            step = f"{self.done:>{len(str(self.total))}}/{self.total}"
            self.line(f"update {step}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left}")

    def line(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._active:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self) -> float:
        """From the mean speed of this process; NaN before its first update."""
        done = self.done - self.start
        return (time.monotonic() - self._begin) / done * (self.total - self.done) if done else math.nan


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
