"""Full gradients of frozen weights, taken in backward passes that touch nothing else.

A probe pass is a forward and backward pass whose only outcome is what its taps hand out: it asks autograd for the
gradients of the taps' anchors, so that no parameter gets a gradient and no hook of an optimizer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import torch

from megalowrank.lowrank.fold import Probed, Tap

Take = Callable[[int, torch.Tensor], None]
"""Called with the number of a weight and its gradient."""


class Probe:
    """Collects the gradients of ``weights`` over ``passes`` backward passes, while it is entered.

    In the last pass ``take(i, gradient)`` gets the mean over the passes of the gradient of weight i, this rank's part
    [out, in] in float32 (float64 if the weight is), as soon as it is complete, in an order that all ranks of a stage
    share; ``take`` may communicate among them. Before that the sums of all ``weights`` are held, if there is more than
    one pass. ``peak`` counts the bytes of gradients held at once.
    """

    def __init__(self, weights: Sequence[Probed], passes: int, take: Take) -> None:
        self.weights, self.passes, self.take = weights, passes, take
        self.anchors: list[torch.Tensor] = []
        self._sums: dict[int, torch.Tensor] = {}
        self._seen = [0] * len(weights)
        self.peak = 0

    def __enter__(self) -> Probe:
        for i, weight in enumerate(self.weights):
            anchor = torch.zeros((), dtype=weight.parameter.dtype, device=weight.parameter.device, requires_grad=True)
            self.anchors.append(anchor)
            weight.tap = Tap(anchor, partial(self._add, i))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for weight in self.weights:
            weight.tap = None
        self.anchors.clear()
        self._sums.clear()

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass of a scalar ``loss``."""
        if self.anchors:
            torch.autograd.grad(loss, self.anchors)

    def _add(self, i: int, gradient: torch.Tensor) -> None:
        exact = gradient if gradient.dtype == torch.float64 else gradient.float()
        held = self._sums.get(i)
        if held is None:
            self._sums[i] = exact
        else:
            held.add_(exact)
        self._seen[i] += 1
        self.peak = max(self.peak, sum(total.nbytes for total in self._sums.values()))
        if self._seen[i] == self.passes:
            self.take(i, self._sums.pop(i).div_(self.passes))


def probe_gradients(
    forward: Callable[[torch.Tensor], torch.Tensor],
    micro_batches: Sequence[torch.Tensor],
    weights: Sequence[Probed],
    take: Take,
) -> int:
    """Probe ``forward``, which makes a loss of tokens, with every micro-batch. Returns the bytes held at the peak."""
    with Probe(weights, len(micro_batches), take) as probe, torch.enable_grad():
        for tokens in micro_batches:
            probe.backward(forward(tokens))
    return probe.peak
