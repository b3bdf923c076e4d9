"""Megatron-core's parallel linears with low-rank factors inside.

Shapes: x [.., in], W [out, in], A [r, in], Bᵀ [r, out] per logical matrix; the matrices of a fused projection are
consecutive row blocks of W. Every rank holds equal parts, padded with zeros (``parallel/partition.py``): a
column-parallel linear a part of the rows of each block, a row-parallel one a part of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megalowrank.lowrank.factors import FixedFactor, LowRankFactors, LowRankSpec
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.lowrank.functions import ColumnFunction, LowRankColumnFunction, LowRankRowFunction, RowFunction
from megalowrank.lowrank.pairs import Pairs
from megalowrank.parallel.mappings import splits_sequence
from megalowrank.parallel.partition import Share, share
from megalowrank.parallel.wire import Wire, mark_partial

Blocks = tuple[tuple[str, int], ...]
Specs = LowRankSpec | Sequence[LowRankSpec | None] | None


class _Adapted(torch.nn.Module):
    """What both parallel linears share.

    ``blocks``: (logical name, share of its rows) of every matrix in order; ``columns``: the share of the input's
    width; ``factors``: those of every adapted matrix, whose names within the linear are ``adapted``; ``weight`` is None
    until it is assigned if it was not allocated.
    """

    split: int
    adapted_function: type[torch.autograd.Function]
    plain_function: type[torch.autograd.Function]

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    skip_bias_add: bool
    blocks: tuple[tuple[str, Share], ...]
    columns: Share
    wire: Wire
    scale: float
    adapted: tuple[str, ...]
    folded: FoldedWeight
    snapshot: bool
    chunks: int
    factors: list[LowRankFactors]

    def _adopt(self, blocks: Blocks, columns: int, lowrank: Specs, wire: Wire) -> None:
        everything, own = (0, 1), (wire.rank, wire.size)
        by_rows, by_columns = (own, everything) if self.split == 0 else (everything, own)
        self.blocks = tuple((name, share(rows, *by_rows)) for name, rows in blocks)
        self.columns, self.wire = share(columns, *by_columns), wire
        self.factors, self.adapted, self.scale = [], (), 0.0
        if self.weight is not None:
            shape = sum(rows.padded for _, rows in self.blocks), self.columns.padded
            if shape != tuple(self.weight.shape):
                raise ValueError(f"a weight {list(self.weight.shape)} for blocks and columns that make {list(shape)}")
            _mark_split(self.weight, self.split)
        if isinstance(lowrank, LowRankSpec):
            lowrank = (lowrank,) * len(blocks)
        if lowrank is not None:
            self._add_all(lowrank)

    def _add_all(self, lowrank: Sequence[LowRankSpec | None]) -> None:
        if self.weight is None:
            raise ValueError("factors need the weight that they adapt")
        self.weight.requires_grad_(False)
        self.folded, row = FoldedWeight(self.weight), 0
        for (name, rows), spec in zip(self.blocks, lowrank, strict=True):
            if spec is not None:
                self._add_factors(name, rows, row, spec)
            row += rows.padded
        self.adapted = tuple(factors.name for factors in self.factors)

    def _add_factors(self, name: str, rows: Share, row: int, lowrank: LowRankSpec) -> None:
        """Those of the matrix whose first row of W is ``row``."""
        train_A, train_B = lowrank.trained(rows.size, self.columns.size)
        A = self._new_factor(f"A_{name}", lowrank.rank, self.columns.padded, train_A)
        Bt = self._new_factor(f"B_{name}", lowrank.rank, rows.padded, train_B)
        divided, replicated = (Bt, A) if self.split == 0 else (A, Bt)
        _mark_split(divided, 1)
        if self.wire.size > 1 and (self.wire.sequence or not self.wire.ride):
            mark_partial(replicated)
        if lowrank.chunks > 1:
            for factor in (A, Bt):
                factor.register_hook(lambda gradient: gradient * lowrank.chunks)
        factors = LowRankFactors(name, A, Bt, self.folded, row, lowrank.scale, rows, self.columns)
        if lowrank.snapshot:
            factors.fixed += self._new_snapshot(name, lowrank.rank, rows)
        self.factors.append(factors)
        self.snapshot, self.chunks, self.scale = lowrank.snapshot, lowrank.chunks, lowrank.scale

    def _new_factor(self, name: str, rank: int, length: int, trained: bool = True) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(rank, length, dtype=self.weight.dtype), requires_grad=trained)
        self.register_parameter(name, parameter)
        return parameter

    def _new_snapshot(self, name: str, rank: int, rows: Share) -> list[FixedFactor]:
        """A' and B'ᵀ of a matrix."""
        found = []
        for side, length in (("A", self.columns), ("B", rows)):
            parameter = self._new_factor(f"{side}_{name}_snapshot", rank, length.padded, trained=False)
            if (side == "B") == (self.split == 0):
                _mark_split(parameter, 1)
            found.append(FixedFactor(f"{side}_snapshot", parameter, length))
        return found

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and Bᵀ of a matrix as the product sees them: [r, in] and [r, out], or [2r, ..] with the snapshots."""
        A, Bt = getattr(self, f"A_{name}"), getattr(self, f"B_{name}")
        if not self.snapshot:
            return A, Bt
        old_A, old_Bt = getattr(self, f"A_{name}_snapshot"), getattr(self, f"B_{name}_snapshot")
        return torch.cat((A, old_A)), torch.cat((Bt, -old_Bt))

    def _apart(self, x_SBI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product on one tensor-parallel rank where parts of the batch see parts of the factors."""
        pieces, parts = x_SBI.chunk(self.chunks, 1), []
        for number, x in enumerate(pieces):
            low = []
            for name, _ in self.blocks:
                own = [getattr(self, f"{side}_{name}{kind}").chunk(self.chunks)[number]
                       for kind in ("", "_snapshot")[: 1 + self.snapshot] for side in "AB"]  # fmt: skip
                product = (x @ own[0].t()) @ own[1]
                low.append(product - (x @ own[2].t()) @ own[3] if self.snapshot else product)
            parts.append(F.linear(x, self.weight, bias) + self.scale * torch.cat(low, -1))
        return torch.cat(parts, 1)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [.., in] -> (y [.., out], bias if it is left to the caller), each this rank's part; every rank calls it.

        Under sequence parallelism dimension 0 is the sequence: a column-parallel linear takes a part of it and gives
        all of it, a row-parallel one the other way round.
        """
        bias = None if self.skip_bias_add else self.bias
        if self.factors and self.chunks > 1:
            y = self._apart(input_, bias)
        elif self.factors:
            A, Bt = zip(*(self._pair(name) for name in self.adapted), strict=True)
            pairs = Pairs(tuple(f.row_start for f in self.factors), tuple(f.taking_part for f in self.factors))
            tap = self.folded.tap
            anchor = None if tap is None else tap.anchor
            y = self.adapted_function.apply(input_, self.weight, bias, pairs, self.wire, tap, anchor, *A, *Bt)
        elif self.wire.size == 1:
            y = F.linear(input_, self.weight, bias)
        else:
            y = self.plain_function.apply(input_, self.weight, bias, self.wire)
        return y, self.bias if self.skip_bias_add else None


class LowRankColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel linear; ``lowrank`` None makes it a plain trainable one, None for a matrix keeps it frozen.

    ``blocks``: (logical name, logical rows) of the matrices in W, ``columns`` their logical width. ``output_size`` of
    megatron-core counts padding: the sum over blocks of ⌈rows / ranks⌉, times the ranks. With
    ``skip_weight_param_allocation`` the weight is assigned later.
    """

    split = 0
    adapted_function, plain_function = LowRankColumnFunction, ColumnFunction

    def __init__(self, *args: Any, blocks: Blocks, columns: int, lowrank: Specs, wire: Wire, **kwargs: Any) -> None:
        ColumnParallelLinear.__init__(self, *args, **{**kwargs, "tp_group": wire.group})
        if self.gather_output:
            raise ValueError("gather_output is not supported: the output stays split")
        self._adopt(blocks, columns, lowrank, wire)


class LowRankRowParallelLinear(_Adapted, RowParallelLinear):
    """Row-parallel linear; ``lowrank`` None makes it a plain trainable one, None for a matrix keeps it frozen.

    ``blocks``: (logical name, logical rows) of the matrices in W, ``columns`` their logical width. ``input_size`` of
    megatron-core counts padding: ⌈columns / ranks⌉ times the ranks. The input is split already.
    """

    split = 1
    adapted_function, plain_function = LowRankRowFunction, RowFunction

    def __init__(self, *args: Any, blocks: Blocks, columns: int, lowrank: Specs, wire: Wire, **kwargs: Any) -> None:
        RowParallelLinear.__init__(self, *args, **{**kwargs, "tp_group": wire.group})
        if not self.input_is_parallel:
            raise ValueError("input_is_parallel=False is not supported: the input comes split")
        self._adopt(blocks, columns, lowrank, wire)
        if self.bias is not None and splits_sequence(wire):
            mark_partial(self.bias)


def _mark_split(parameter: torch.nn.Parameter, dim: int) -> None:
    """Tell who counts parameters that every rank holds another part of this one."""
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
