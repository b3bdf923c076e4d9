"""Both ends of a decoder, divided by rows of the vocabulary: word embedding and next-token loss.

Shapes: S sequence, B batch, V vocabulary (of this rank, padded), H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megalowrank.lowrank.linear import LowRankColumnParallelLinear
from megalowrank.parallel.collectives import max_over
from megalowrank.parallel.mappings import reduce_output
from megalowrank.parallel.partition import Share
from megalowrank.parallel.wire import Wire


class WordEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding with a forward pass that knows sequence parallelism on every device.

    While ``ones`` every word is a vector of ones.
    """

    def __init__(self, vocabulary: Share, hidden: int, wire: Wire, config: Any) -> None:
        super().__init__(vocabulary.padded * wire.size, hidden, init_method=config.init_method, config=config)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.share, self.wire, self.ones = vocabulary, wire, False

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [S, B, H]; under sequence parallelism this rank's part of S."""
        if self.ones:
            batch, length = tokens_BS.shape
            own = length // self.wire.size if self.wire.sequence else length
            return self.weight.new_ones(own, batch, self.weight.shape[1])
        if self.wire.size == 1:
            return F.embedding(tokens_BS, self.weight).transpose(0, 1).contiguous()
        local = tokens_BS.t() - self.share.start
        foreign = (local < 0) | (local >= self.share.real)
        hidden = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return reduce_output(hidden.masked_fill(foreign[..., None], 0.0), self.wire)


class Head(LowRankColumnParallelLinear):
    """The output projection, without factors; on one rank too the gradient of its weight comes contiguous.

    torch's own linear leaves it transposed, and a copy of the largest gradient of the model would be made.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> [S, B, V]."""
        return self.plain_function.apply(input_, self.weight, None, self.wire), None


def token_losses(logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocabulary: Share, wire: Wire) -> torch.Tensor:
    """Cross-entropy of every token [S, B]; padded rows of the vocabulary have probability 0.

    megatron-core's works in float32, so float64 takes torch's on one rank, and its own sum over ranks otherwise.
    Every rank of the tensor-parallel group calls it and gets all losses.
    """
    if vocabulary.real < vocabulary.padded:
        padding = torch.arange(vocabulary.padded, device=logits_SBV.device) >= vocabulary.real
        logits_SBV = logits_SBV.masked_fill(padding, -torch.inf)
    if logits_SBV.dtype != torch.float64:
        return vocab_parallel_cross_entropy(logits_SBV, labels_SB)
    if wire.size == 1:
        return F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view_as(labels_SB)
    return _exact_losses(logits_SBV, labels_SB, vocabulary, wire)


def _exact_losses(logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocabulary: Share, wire: Wire) -> torch.Tensor:
    """log Σ exp(logits) - logit of the label, in the precision of the logits."""
    whole = Wire(wire.group, wire.rank, wire.size)
    largest = max_over(logits_SBV.detach().amax(-1), wire.group)
    shifted = logits_SBV - largest[..., None]
    local = labels_SB - vocabulary.start
    foreign = (local < 0) | (local >= vocabulary.real)
    chosen = shifted.gather(-1, local.masked_fill(foreign, 0)[..., None])[..., 0].masked_fill(foreign, 0.0)
    total = reduce_output(shifted.exp().sum(-1), whole)
    return total.log() - reduce_output(chosen, whole)
