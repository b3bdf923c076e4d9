"""Pruning of Adam's moments by the logical tensor, wherever its elements lie.

Thresholds are quantiles of a whole factor. Ranks agree on them by counts alone: a radix search over the bits of
the values finds the exact order statistic with one all-reduce of counts per byte, for all factors at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megalowrank.errors import TrainingError
from megalowrank.lowrank.factors import FactorPlace
from megalowrank.lowrank.state import MomentPiece, OptimizerStateView
from megalowrank.parallel.rng import uniform

MOMENTS = ("exp_avg", "exp_avg_sq")
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_DIGIT, _BUCKETS = 8, 256
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pruning:
    """How moments are pruned.

    ``how``: zero (everything), random (each element with probability ``share``) or magnitude (what is not above
    the ``share`` quantile of the absolute values of its factor). ``shared``: the mask of exp_avg serves both
    moments; otherwise each has its own.
    """

    how: str
    share: float = 1.0
    shared: bool = True


def prune(state: OptimizerStateView, rule: Pruning, seed: int, step: int) -> dict[str, float]:
    """Prune the moments of every factor; returns the share of zeros in each moment of the model afterwards.

    Every rank calls it alike. Raises TrainingError, on all ranks, if fewer elements are zero afterwards than the
    rule says. Padding counts as nothing.
    """
    limits = _thresholds(state, rule) if rule.how == "magnitude" else None
    for factor in range(len(state.shapes)):
        for piece in state.moments(factor):
            if rule.how == "zero":
                piece.exp_avg.zero_()
                piece.exp_avg_sq.zero_()
            elif limits is None:
                _prune_random(piece, rule, seed, step, state.places[factor])
            else:
                _prune_small(piece, rule, [limit[factor] for limit in limits])
    return _check(state, rule, step)


def _prune_small(piece: MomentPiece, rule: Pruning, limits: list[torch.Tensor]) -> None:
    keep = piece.exp_avg.abs() > limits[0].to(piece.exp_avg.device)
    keep_sq = keep if rule.shared else piece.exp_avg_sq.abs() > limits[1].to(piece.exp_avg.device)
    piece.exp_avg.masked_fill_(~keep, 0.0)
    piece.exp_avg_sq.masked_fill_(~keep_sq, 0.0)


def _prune_random(piece: MomentPiece, rule: Pruning, seed: int, step: int, place: FactorPlace) -> None:
    """Masks are keyed by the factor and the element in the whole model, so that no layout matters."""
    streams = [f"prune/{step}/{'both' if rule.shared else name}" for name in MOMENTS]
    for begin in range(0, piece.exp_avg.numel(), _CHUNK):
        end = min(begin + _CHUNK, piece.exp_avg.numel())
        rows, columns = np.divmod(np.arange(piece.start + begin, piece.start + end), place.length.padded)
        elements = rows * place.length.size + place.length.start + columns
        for name, stream in zip(MOMENTS, streams, strict=True):
            values = getattr(piece, name)[begin:end]
            pruned = uniform(seed, stream, np.array([place.number]), elements)[0] <= rule.share
            values.masked_fill_(torch.from_numpy(pruned).to(values.device), 0.0)


def _logical(state: OptimizerStateView, factor: int, moment: str) -> Iterator[torch.Tensor]:
    """The elements of a moment that this rank holds and counts, without padding, 1-D."""
    place = state.places[factor]
    if not place.counted:
        return
    for piece in state.moments(factor):
        values = getattr(piece, moment)
        if place.length.real < place.length.padded:
            columns = torch.arange(piece.start, piece.start + values.numel(), device=values.device)
            values = values[columns % place.length.padded < place.length.real]
        yield values


def _sizes(state: OptimizerStateView) -> torch.Tensor:
    """Elements of the logical factors of this stage, int64 [factors]."""
    rows = [shape[0] for shape in state.shapes]
    sizes = [count * place.length.size for count, place in zip(rows, state.places, strict=True)]
    return torch.tensor(sizes, dtype=torch.int64)


def _thresholds(state: OptimizerStateView, rule: Pruning) -> list[torch.Tensor]:
    """The quantile of the absolute values, for every moment that has a mask of its own and every factor."""
    return [quantiles(state, name, rule.share) for name in (MOMENTS[:1] if rule.shared else MOMENTS)]


def quantiles(state: OptimizerStateView, moment: str, share: float) -> torch.Tensor:
    """The ``share`` quantile of |moment| of every factor as a whole: [factors], on the CPU, as precise as the moments.

    Linear interpolation between order statistics, at position share · (N - 1). Every rank calls it.
    """
    sizes = _sizes(state)
    position = share * (sizes - 1).double()
    low = position.floor().long()
    ranks = torch.stack((low, torch.minimum(low + 1, sizes - 1)))
    below, above = _select(state, moment, ranks)
    return torch.lerp(below, above, (position - low).to(below.dtype))


def _select(state: OptimizerStateView, moment: str, ranks: torch.Tensor) -> torch.Tensor:
    """Values of the given ``ranks`` (0: smallest) among |moment| of every factor: [targets, factors]."""
    width = torch.finfo(state.dtype).bits
    left, prefix = ranks.clone(), torch.zeros_like(ranks)
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(*ranks.shape, _BUCKETS, dtype=torch.int64)
        for factor in range(ranks.shape[1]):
            for values in _logical(state, factor, moment):
                bits = values.abs().view(_BITS[state.dtype]).to(torch.int64)
                _count(bits, shift, width, prefix[:, factor], counts[:, factor])
        reached = state.sum_over_shards(counts).cumsum(-1)
        digit = (reached <= left[..., None]).sum(-1)
        before = torch.where(digit > 0, reached.gather(-1, (digit - 1).clamp_min(0)[..., None])[..., 0], 0)
        left -= before
        prefix = (prefix << _DIGIT) + digit
    return prefix.to(_BITS[state.dtype]).view(state.dtype)


def _count(bits: torch.Tensor, shift: int, width: int, prefix: torch.Tensor, counts: torch.Tensor) -> None:
    """Add to ``counts`` [targets, buckets] the next digit of the elements that begin with each prefix."""
    for target, value in enumerate(prefix.tolist()):
        if target and value == int(prefix[0]):
            counts[target] = counts[0]
            continue
        chosen = bits if shift + _DIGIT == width else bits[(bits >> (shift + _DIGIT)) == value]
        counts[target] += torch.bincount((chosen >> shift) & (_BUCKETS - 1), minlength=_BUCKETS).cpu()


def _check(state: OptimizerStateView, rule: Pruning, step: int) -> dict[str, float]:
    """The share of zeros in each moment, counted anew; fewer than the rule says end the run."""
    counts = torch.zeros(len(MOMENTS), dtype=torch.int64)
    for factor in range(len(state.shapes)):
        for i, name in enumerate(MOMENTS):
            counts[i] += sum(v.numel() - int(torch.count_nonzero(v)) for v in _logical(state, factor, name))
    own = torch.tensor([int(_sizes(state).sum()), len(state.shapes)])
    *zero, total, factors = state.sum_over_stages(torch.cat((state.sum_over_shards(counts), own))).tolist()
    zeros = [count / max(total, 1) for count in zero]
    slack = {"zero": 0.0, "magnitude": factors / max(total, 1)}
    spread = 6.0 * (rule.share * (1.0 - rule.share) / max(total, 1)) ** 0.5
    wanted = rule.share - slack.get(rule.how, spread)
    if min(zeros) < wanted:
        raise TrainingError(
            f"moments were not pruned at step {step}: {min(zeros):.4f} of them are zero, not {wanted:.4f} or more"
        )
    return dict(zip(MOMENTS, zeros, strict=True))
