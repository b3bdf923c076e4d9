"""Calls and bytes of the collectives of one rank, by group and collective, with the names that a count uses."""

from __future__ import annotations

from megalowrank.models.accounting.layout import Layout
from megalowrank.parallel.traffic import Volume

Volumes = dict[tuple[str, str], Volume]

_AXES = {"world": "tdp", "model": "tp", "stage": "td", "pipe": "p", "data": "d", "tensor": "t"}
_LABELS = {"tp": "model", "td": "stage", "p": "pipe", "d": "data", "t": "tensor"}


def group_name(kind: str, layout: Layout) -> str | None:
    """What a count calls the group ``kind`` (world, model, stage, pipe, data or tensor); None for a single rank."""
    sizes = {"t": layout.tensor_size, "d": layout.data_size, "p": layout.pipe_size}
    real = "".join(axis for axis in _AXES[kind] if sizes[axis] > 1)
    return _LABELS.get(real, "world") if real else None


class Tally:
    """Volumes of one rank."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.volumes = layout, {}

    volumes: Volumes

    def add(self, kind: str, collective: str, payload: float, calls: int = 1) -> None:
        """``calls`` of a collective that move ``payload`` bytes in all."""
        group = group_name(kind, self.layout)
        if group is None or not calls:
            return
        volume = self.volumes.setdefault((group, collective), Volume())
        volume.calls, volume.payload = volume.calls + calls, volume.payload + round(payload)
