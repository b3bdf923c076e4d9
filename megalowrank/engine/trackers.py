"""Where the numbers of a run go: metrics.jsonl, TensorBoard always, wandb if asked. Only the first rank writes."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalowrank.config import OutputConfig
from megalowrank.engine.metrics import MetricsWriter, Sink, plain, replace_text
from megalowrank.errors import ConfigError


class Trackers:
    """Several sinks behind the interface of one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand ``record`` to every sink; numbers may be scalar tensors, what is not finite becomes None."""
        found = plain(record) if self.sinks else {}
        for sink in self.sinks:
            sink.write(found)

    def truncate_from(self, step: int) -> None:
        """The run starts again at ``step``; wandb connects now, so that it is refused before the first update."""
        for sink in self.sinks:
            sink.truncate_from(step)

    def close(self) -> None:
        """Everything is written."""
        for sink in self.sinks:
            sink.close()


def open_trackers(folder: Path | None, output: OutputConfig, is_main: bool, run: Mapping[str, Any]) -> Trackers:
    """The sinks of a run; ``folder`` is its output folder and ``run`` its resolved configuration.

    Every rank calls it and only the first (``is_main``) gets sinks. Nothing is written or imported before the first
    record. Raises ConfigError, on every rank alike, for a tracker that is asked for and not installed.
    """
    events = output.tensorboard_dir or (None if folder is None else str(folder / "tensorboard"))
    if events is not None:
        _require("tensorboard", "TensorBoard events are always written, and need the package tensorboard")
    if output.wandb_project:
        _require("wandb", "--wandb-project needs the package wandb")
    if not is_main:
        return Trackers([])
    sinks: list[Sink] = []
    if folder is not None:
        sinks.append(MetricsWriter(folder / "metrics.jsonl", True))
    if events is not None:
        sinks.append(TensorBoard(Path(events)))
    if output.wandb_project:
        sinks.append(Wandb(output, folder, run))
    return Trackers(sinks)


def _require(package: str, reason: str) -> None:
    """A folder of that name, which wandb itself leaves behind, is no package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{reason}, which is not installed", None, f"pip install {package}")


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)):
            yield key, value


class TensorBoard:
    """Every number of every record as a scalar under its own name.

    A resumed run writes a new file beside the old ones, whose first event tells TensorBoard to forget the steps
    that come again. Events are in the file before ``write`` returns.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purge: int | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the scalars of ``record``; ConfigError if the folder cannot be written."""
        writer = self._open()
        for key, value in _scalars(record):
            writer.add_scalar(key, value, record["step"])
        writer.flush()

    def truncate_from(self, step: int) -> None:
        """The next file replaces everything from ``step`` on."""
        self.close()
        self._purge = step

    def close(self) -> None:
        """Close the file; a later ``write`` opens another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
            except OSError as error:
                raise ConfigError(f"cannot write {self._folder}: {error.strerror}") from None
        return self._writer


class Wandb:
    """A run of Weights & Biases with ``run`` as its configuration.

    The name of the run there is kept in ``wandb_id`` in the output folder, so that a resumed run goes on in the same
    one. ``step`` is a value like the others and the x-axis of all: steps that are done again appear twice.
    """

    def __init__(self, output: OutputConfig, folder: Path | None, run: Mapping[str, Any]) -> None:
        self._output, self._folder, self._config = output, folder, dict(run)
        self._run: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the scalars of ``record`` and its step."""
        if self._run is None:
            self._start(0)
        self._run.log({"step": record["step"], **dict(_scalars(record))})

    def truncate_from(self, step: int) -> None:
        """Connect: to the run of before if ``step`` is not the first."""
        self.close()
        self._start(step)

    def close(self) -> None:
        """Wait until everything is sent, or on disk."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _start(self, step: int) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=self._output.wandb_project,
                name=self._output.wandb_name or (self._folder.name if self._folder else None),
                mode=self._output.wandb_mode,
                dir=None if self._folder is None else str(self._folder),
                id=self._identity(step > 1),
                resume="allow",
                config=self._config,
            )
        except wandb.Error as error:
            raise ConfigError(f"wandb does not start: {error}", None, "wandb login, or --wandb-mode offline") from None
        self._run.define_metric("*", step_metric="step")

    def _identity(self, resumed: bool) -> str:
        """The name of the run on the server; a new one for a run that starts."""
        new = secrets.token_hex(4)
        if self._folder is None:
            return new
        path = self._folder / "wandb_id"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if resumed and path.exists():
                return path.read_text().strip() or new
        except OSError as error:
            raise ConfigError(f"cannot use {path}: {error.strerror}") from None
        replace_text(path, new + "\n")
        return new
