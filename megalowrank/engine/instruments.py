"""What looks at single updates from outside: torch's profiler, the memory recorder and the count of collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megalowrank.config import DiagnosticsConfig
from megalowrank.errors import ConfigError
from megalowrank.parallel.groups import Groups
from megalowrank.parallel.traffic import Traffic, Volume


class Instruments:
    """The instruments that the user asked for, around every update of this rank.

    ``folder`` takes the traces. Raises ConfigError for instruments that cannot work here.
    """

    def __init__(self, config: DiagnosticsConfig, folder: Path | None, groups: Groups, device: torch.device) -> None:
        self.config, self.rank, self.device = config, groups.rank, device
        self.traffic = Traffic(groups.labels()) if config.comms_summary else None
        self._totals: dict[tuple[str, str], Volume] = {}
        self._measured = self._since = 0
        self._profiler: Any = None
        profiled = config.profiled()
        if (profiled is not None or config.memory_snapshot) and folder is None:
            raise ConfigError("--profile-steps and --memory-snapshot need --output-dir or --save, where they write")
        absent = [rank for rank in config.ranks() if rank >= groups.world]
        if profiled is not None and absent:
            raise ConfigError("--profile-ranks names a rank that is not there", absent[0], f"< {groups.world}")
        if config.memory_snapshot and device.type != "cuda":
            raise ConfigError("--memory-snapshot records the allocator of an NVIDIA GPU", f"device {device.type}")
        self.folder = Path() if folder is None else folder / "profile"
        self.steps = range(0) if profiled is None or self.rank not in config.ranks() else profiled

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around update ``step`` (0-based), the method's work before it included."""
        if step in self.steps and self._profiler is None:
            self._start()
        if self.traffic is None:
            yield
        else:
            with self.traffic:
                yield
            self._measured, self._since = self._measured + 1, self._since + 1
        if self._profiler is not None:
            self._profiler.step()
            if step + 1 not in self.steps:
                self.close()

    def counters(self) -> dict[str, float]:
        """Bytes of an update since the last call, on average, for a log line: one number a group and collective."""
        if self.traffic is None:
            return {}
        found = self.traffic.take()
        for key, volume in found.items():
            total = self._totals.setdefault(key, Volume())
            total.calls, total.payload = total.calls + volume.calls, total.payload + volume.payload
        updates, self._since = max(self._since, 1), 0
        return {f"comm_bytes/{group}/{name}": volume.payload / updates for (group, name), volume in found.items()}

    def summary(self) -> list[str]:
        """Mean bytes and calls of an update by group and collective; empty unless asked for."""
        if self.traffic is None:
            return []
        self.counters()
        lines = [f"{'collectives of an update':<28}{'calls':>10}{'bytes':>16}"]
        for (group, name), volume in sorted(self._totals.items()):
            calls, payload = volume.calls / self._measured, volume.payload / self._measured
            lines.append(f"{group + ': ' + name:<28}{calls:>10.1f}{payload:>16,.0f}")
        return lines if self._totals else [*lines, "none: every group has one rank"]

    def close(self) -> None:
        """Write what is still being recorded."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / f"trace_rank{self.rank}.json"))
        table = self._profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self.folder / f"operators_rank{self.rank}.txt").write_text(table)
        if self.config.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_rank{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler, self.steps = None, range(0)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self.config.memory_snapshot:
            torch.cuda.memory._record_memory_history()
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.start()
