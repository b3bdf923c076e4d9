"""One adapted matrix X whose loss is any function of it: what is known of GoLore on paper, without a language model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.lowrank.functions import LowRankColumnFunction
from megalowrank.lowrank.pairs import Pairs
from megalowrank.methods.base import Context
from megalowrank.methods.golore import GoLore
from megalowrank.parallel.wire import Wire

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OneMatrix(torch.nn.Module):
    """loss(X, batch) of X = W + s·B·A [out, in], float64."""

    def __init__(self, method: GoLore, start: torch.Tensor, loss: Loss) -> None:
        super().__init__()
        self.loss, spec = loss, method.adapters().spec
        rows, columns = start.shape
        self.W = torch.nn.Parameter(start.double().clone(), requires_grad=False)
        trained = spec.trained(rows, columns)
        sizes = (columns, rows)
        self.A, self.Bt = (
            torch.nn.Parameter(torch.zeros(spec.rank, size, dtype=torch.float64), requires_grad=wanted)
            for size, wanted in zip(sizes, trained, strict=True)
        )
        self.layer = LowRankFactors("X", self.A, self.Bt, FoldedWeight(self.W), 0, spec.scale)
        self.layer.index = 0
        for parameter, value in zip(
            (self.A, self.Bt), method.initial_factors(self.layer, 7, torch.float64), strict=True
        ):
            parameter.data.copy_(value)

    def whole(self) -> torch.Tensor:
        """X [out, in]."""
        tap, layer = self.layer.weight.tap, self.layer
        anchor = None if tap is None else tap.anchor
        eye = torch.eye(layer.in_features, dtype=torch.float64)
        pairs = Pairs((0,), (layer.scale,))
        return LowRankColumnFunction.apply(eye, self.W, None, pairs, Wire(), tap, anchor, self.A, self.Bt).t()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.whole(), batch)


class Trial:
    """A method on one matrix."""

    def __init__(self, method: GoLore, start: torch.Tensor, loss: Loss, iterations: int, eps: float = 1e-12) -> None:
        self.method, self.module = method, OneMatrix(method, start, loss)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.engine = DenseEngine(self.module, [self.module.layer], VectorClockAdamW(trained, eps=eps), 0.0)
        self.ctx = Context(
            [self.module.layer], self.engine.state, 7, iterations, 0, 1,
            lambda numel, dtype: torch.empty(numel, dtype=dtype), engine=self.engine,
        )  # fmt: skip
        method.start(self.ctx)

    def announce(self, step: int, batch: torch.Tensor) -> None:
        """What comes before update ``step``."""
        self.ctx.micro_batches = [batch]
        self.method.before_step(step, self.ctx)

    def update(self, step: int, batch: torch.Tensor, lr: float) -> None:
        """One update."""
        self.announce(step, batch)
        self.engine.train_step(self.ctx.micro_batches, lr)

    @property
    def trained(self) -> int:
        """The number of the trained factor."""
        return int(self.module.Bt.requires_grad)
