"""Pruning of sharded moments against torch.quantile on the whole tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import megalowrank.lowrank.prune as prune_module
from megalowrank.errors import TrainingError
from megalowrank.lowrank.prune import MOMENTS, Pruning, prune, quantiles
from megalowrank.lowrank.state import FlatForwardCopy, FlatPartition, Fragment, OptimizerStateView
from tests.harness import run_ranks
from tests.lowrank.prune_cases import SHAPES, moments_of, view_of

SHARES = (0.1, 0.5, 0.9, 0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_quantiles_are_those_of_torch(dtype: torch.dtype, ties: bool) -> None:
    whole = moments_of(0, ties, dtype)
    view = view_of(whole, 0, 1, dtype)
    for name in MOMENTS:
        for share in SHARES:
            found = quantiles(view, name, share)
            expected = [torch.quantile(values.abs().flatten().double(), share).to(dtype) for values in whole[name]]
            assert found.dtype == dtype
            assert torch.allclose(found, torch.stack(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_magnitude_keeps_what_is_above_its_quantile(shared: bool, share: float) -> None:
    whole = moments_of(1, False, torch.float32)
    view = view_of(whole, 0, 1, torch.float32)
    shares = prune(view, Pruning("magnitude", share, shared), 0, 5)
    for factor, first in enumerate(whole["exp_avg"]):
        keep = first.abs() > torch.quantile(first.abs().flatten(), share)
        second = whole["exp_avg_sq"][factor]
        keep_sq = keep if shared else second.abs() > torch.quantile(second.abs().flatten(), share)
        (piece,) = view.moments(factor)
        assert torch.equal(piece.exp_avg, (first * keep).flatten())
        assert torch.equal(piece.exp_avg_sq, (second * keep_sq).flatten())
    assert all(value == pytest.approx(share, abs=0.05) for value in shares.values())


def test_what_is_no_factor_is_not_touched() -> None:
    parameter, norm = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))
    partition = FlatPartition(torch.zeros(17), [], [Fragment(norm, 0, 0, 5), Fragment(parameter, 5, 0, 12)])
    partition.exp_avg.fill_(1.0)
    partition.exp_avg_sq.fill_(1.0)
    view = OptimizerStateView(
        [parameter], [partition], FlatForwardCopy(torch.zeros(17), np.array([5])), None, masters_sharded=False
    )
    assert prune(view, Pruning("zero"), 0, 1) == {"exp_avg": 1.0, "exp_avg_sq": 1.0}
    assert partition.exp_avg.tolist() == [1.0] * 5 + [0.0] * 12


def test_random_masks_have_the_right_share_and_depend_on_the_step() -> None:
    kept = {}
    for step in (3, 4):
        for shared in (True, False):
            view = view_of(moments_of(2, False, torch.float32), 0, 1, torch.float32)
            prune(view, Pruning("random", 0.8, shared), 7, step)
            masks = {name: torch.cat([getattr(p, name) != 0 for f in range(len(SHAPES)) for p in view.moments(f)])
                     for name in MOMENTS}  # fmt: skip
            assert all(float(mask.float().mean()) == pytest.approx(0.2, abs=0.05) for mask in masks.values())
            assert torch.equal(*masks.values()) == shared
            first, other = (view.moments(f)[0].exp_avg[:200] != 0 for f in (0, 3))
            assert not torch.equal(first, other), "factors have masks of their own"
            kept[step, shared] = masks["exp_avg"]
    assert not torch.equal(kept[3, True], kept[4, True])


def test_random_masks_do_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    views = []
    for chunk in (1 << 20, 7):
        monkeypatch.setattr(prune_module, "_CHUNK", chunk)
        views.append(view_of(moments_of(2, False, torch.float32), 0, 1, torch.float32))
        prune(views[-1], Pruning("random", 0.8, False), 7, 3)
    for name in MOMENTS:
        assert torch.equal(*(getattr(view.partitions[0], name) for view in views))


@pytest.mark.parametrize("spared", [MOMENTS, MOMENTS[:1], MOMENTS[1:]])
def test_a_prune_that_does_nothing_ends_the_run(spared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What public ports do: 0.00 % zeroed, and nobody notices; for one moment or for both."""
    view = view_of(moments_of(0, False, torch.float32), 0, 1, torch.float32)
    original = view.moments
    monkeypatch.setattr(
        view, "moments", lambda f: [replace(p, **{n: getattr(p, n).clone() for n in spared}) for p in original(f)]
    )
    for how in ("zero", "random", "magnitude"):
        with pytest.raises(TrainingError, match="not pruned at step 9"):
            prune(view, Pruning(how, 1.0 if how == "zero" else 0.5), 0, 9)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_a_part_each_prune_as_one_process_does(world: int, tmp_path: Path) -> None:
    """Random cuts in the middle of vectors, one rank almost without elements; masks equal element by element."""
    for rank in run_ranks("tests.lowrank.prune_cases:compare", world, None, tmp_path):
        assert len(rank) == 6
        for report in rank:
            assert report["equal"] and report["shares"] == report["expected"], report
