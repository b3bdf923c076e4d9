"""Mappings between the linears of a tensor-parallel group: right sums and pieces whatever the strides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalowrank.parallel.mappings import gather_rows, reduce_output, reduce_rows
from megalowrank.parallel.wire import Wire
from tests.harness import run_ranks
from tests.parallel.mapping_cases import BATCH, ROWS, WIDTH


@pytest.mark.parametrize("world", [2, 3])
def test_mappings(world: int, tmp_path: Path) -> None:
    volume = [1, ROWS * BATCH * WIDTH * 8]
    for report in run_ranks("tests.parallel.mapping_cases:everything", world, None, tmp_path):
        assert len(report["checks"]) == 68
        assert [name for name, good in report["checks"].items() if not good] == []
        assert report["traffic"]["whole"] == {"all-reduce": volume}
        assert report["traffic"]["sequence"] == {"reduce-scatter": volume, "all-gather": volume}


@pytest.mark.parametrize("wire", [Wire(), Wire(sequence=True)])
def test_one_rank_copies_nothing(wire: Wire) -> None:
    x = torch.ones(4, 3).t().requires_grad_()
    for found in (reduce_output(x, wire), reduce_rows(x, wire), gather_rows(x, wire)):
        assert found is x
