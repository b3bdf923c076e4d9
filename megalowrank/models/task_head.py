"""The head of a labelled task in place of the vocabulary's: one linear without bias, read at the last real token.

Attention is causal, so that padding on the right of a text changes nothing in front of it and needs no mask.
Shapes: S sequence, B batch, K outputs, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalowrank.data.labelled_batches import MILLION
from megalowrank.parallel.mappings import reduce_output, splits_sequence
from megalowrank.parallel.wire import Wire, mark_partial


class TaskHead(torch.nn.Module):
    """Logits of K classes; with K = 1 the value of a regression. Every tensor-parallel rank holds the weight whole.

    While ``kept`` is a list, the logits [B, K] of every batch whose loss is computed are added to it.
    """

    def __init__(self, hidden: int, outputs: int, wire: Wire, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, hidden, dtype=dtype))
        self.wire = wire
        self.kept: list[torch.Tensor] | None = None
        if wire.sequence:
            mark_partial(self.weight)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> logits of every position [S, B, K]; under sequence parallelism of this rank's part of S."""
        return F.linear(hidden, self.weight), None

    def last(self, logits_SBK: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The logits [B, K] of the last of ``lengths_B`` tokens of every sample, on every tensor-parallel rank."""
        places, columns = lengths_B - 1, torch.arange(len(lengths_B), device=logits_SBK.device)
        if not splits_sequence(self.wire):
            return logits_SBK[places, columns]
        own = places - self.wire.rank * len(logits_SBK)
        foreign = (own < 0) | (own >= len(logits_SBK))
        found = logits_SBK[own.masked_fill(foreign, 0), columns].masked_fill(foreign[:, None], 0.0)
        return reduce_output(found, Wire(self.wire.group, self.wire.rank, self.wire.size))

    def loss(self, logits_SBK: torch.Tensor, targets_B2: torch.Tensor) -> torch.Tensor:
        """Mean over samples of the cross-entropy in nats, or of the squared error; ``targets_B2``: length and label."""
        lengths_B, labels_B = targets_B2.unbind(1)
        logits_BK = self.last(logits_SBK, lengths_B)
        if self.kept is not None:
            self.kept.append(logits_BK.detach())
        return task_loss(logits_BK, labels_B)


def task_loss(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of classes, or squared error of values in millionths, in float32 at least."""
    exact = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
    if exact.shape[1] > 1:
        return F.cross_entropy(exact, labels_B)
    return F.mse_loss(exact[:, 0], labels_B.to(exact.dtype) / MILLION)
