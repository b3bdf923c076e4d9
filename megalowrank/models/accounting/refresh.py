"""What a change of all subspaces moves and holds, beside its probe passes.

A probe pass moves what an update moves, less everything that has to do with gradients and weights after the last
backward pass. What comes on top, for a matrix [m, n] of rank r; l is the shorter of m and n, along which the projector
lies, o the other one, along which the trained factor does:

| what                       | group  | collective                       | bytes                       |
|----------------------------|--------|----------------------------------|-----------------------------|
| gradient to its owner      | data   | reduce                           | 4 m n, this rank's part     |
| Gram matrix                | tensor | reduce, if l is not split        | 8 l²                        |
| gradient                   | tensor | gather, if l is split            | 4 m n                       |
| projectors of all matrices | both   | all-reduce, once a pass          | 4 r l                       |
| trained factor, fold       | data   | all-reduce, if masters are split | 4 r o                       |
| momentum, if it is rotated | data   | all-reduce, if masters are split | 4 r o                       |

Of the work between tensor-parallel ranks a data-parallel rank has its share of the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import projects_rows
from megalowrank.methods.base import Adapters, RefreshPlan
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import local_sizes
from megalowrank.models.accounting.shapes import Matrix, all_projections
from megalowrank.models.accounting.tally import Tally, Volumes

_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class Refresh:
    """A refresh on every rank of a stage: its collectives, and the most bytes of gradients held at once."""

    interval: int
    volumes: Volumes
    held: int

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; bytes."""
        return {
            "interval": self.interval, "held_bytes": self.held, "bytes_per_update": self.sent_per_update,
            "collectives": [
                {"group": group, "collective": name, "calls": volume.calls, "bytes": volume.payload}
                for (group, name), volume in sorted(self.volumes.items())
            ],
        }  # fmt: skip

    @property
    def sent_per_update(self) -> float:
        """Bytes of its collectives, spread over the updates between two of them."""
        return sum(volume.payload for volume in self.volumes.values()) / self.interval


def refresh_of(
    config: ModelConfig, adapters: Adapters | None, layout: Layout, plan: RefreshPlan, stage: int = 0
) -> Refresh:
    """Predict a refresh that searches, as ``plan`` says. Raises ConfigError as ``wire_bytes`` does."""
    tally, blocks, held = Tally(layout), stage_blocks(config, adapters, layout, stage), 0
    shared = 0
    for projection in all_projections(config, adapters):
        if projection.block not in blocks or not projection.adapted:
            continue
        for matrix, (rows, columns) in zip(projection.matrices, local_sizes(projection, layout), strict=True):
            if not matrix.rank:
                continue
            right = projects_rows(matrix.rows, matrix.columns)
            _search(tally, matrix, rows, columns, split=projection.by_rows != right and layout.tensor_size > 1)
            shared += matrix.rank * (matrix.columns if right else matrix.rows)
            own, length = (rows, columns) if right else (columns, rows)
            _turn(tally, matrix.rank * own, matrix.rank * length, plan.rotates)
            held += rows * columns * _FLOAT
    for kind in ("tensor", "data"):
        tally.add(kind, "all-reduce", _FLOAT * (shared + plan.passes), plan.passes)
    return Refresh(plan.interval, tally.volumes, held // plan.passes if layout.accumulation > 1 else 0)


def _search(tally: Tally, matrix: Matrix, rows: int, columns: int, split: bool) -> None:
    """``split``: tensor-parallel ranks hold different parts of the wanted vectors."""
    tally.add("data", "reduce", _FLOAT * rows * columns)
    if split:
        tally.add("tensor", "gather", _FLOAT * matrix.numel / tally.layout.data_size)
    else:
        gram = min(matrix.rows, matrix.columns) ** 2
        tally.add("tensor", "reduce", _DOUBLE * gram / tally.layout.data_size)


def _turn(tally: Tally, trained: int, fixed: int, rotates: bool) -> None:
    """Elements of the trained and of the fixed factor of a matrix on this rank."""
    layout = tally.layout
    if layout.sharded:
        tally.add("data", "all-reduce", _FLOAT * trained * (1 + rotates), 1 + rotates)
    if layout.zero == 3 and fixed > layout.persistence_threshold:
        tally.add("data", "all-reduce", layout.low * fixed)
