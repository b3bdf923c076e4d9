"""Bytes that autograd keeps between the forward and the backward pass of a micro-batch, on one rank.

What every module saves, tensor by tensor; N tokens of the micro-batch, n of them between linears on this rank (n < N
only under sequence parallelism), H hidden, R sum of the ranks of a projection. Parameters do not count, neither do
the angles of the rotary embedding. Attention is a fused kernel that keeps no scores.

| module                | keeps                                                                                      |
|-----------------------|--------------------------------------------------------------------------------------------|
| norm                  | its input [n, H] and one or two numbers a token; RMSNorm on the CPU two float32 copies     |
| column-parallel       | its input [n, H], and u [N, R] of the factors; *partial* under sequence parallelism [N, H] |
| snapshots             | u [N, 2R], and both pairs of factors joined                                                |
| attention             | q, k, v, rotated q and k, the output, one number a head and token; sines and cosines       |
| activation            | its input [N, F] ([N, 2F] gated, and both sides of the product); ReLU nothing of its own   |
| row-parallel          | its input, and u: [n, R] that rides, [N, R] otherwise                                      |
| word embedding        | the tokens                                                                                 |
| loss                  | the softmax in float32, target and mask of every token                                     |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.parts import local_sizes
from megalowrank.models.accounting.shapes import Projection, all_projections, head_rows
from megalowrank.models.architecture import architecture
from megalowrank.parallel.partition import share

INTEGER, FLOAT = 8, 4


@dataclass(frozen=True)
class Kept:
    """Bytes that one micro-batch keeps: each block of a stage, what a recomputed block keeps instead, both ends.

    ``logits`` and ``inner`` are held for a moment: the logits in low precision (and their gradient in a pipeline,
    where DeepSpeed keeps the logits), the gradients within an MLP. ``passed`` is what a stage keeps of its output,
    ``buffers`` what it receives into, once, and what DeepSpeed's two buffers keep of finished micro-batches on the last
    stage: logits, input and its gradient.
    """

    blocks: list[int]
    block_input: int
    begin: int
    end: int
    logits: int
    inner: int
    passed: int
    buffers: int

    def most(self, in_flight: int, recompute: bool) -> int:
        """The most that is kept at once with ``in_flight`` micro-batches between forward and backward.

        A block that is recomputed keeps everything while its backward pass runs; the head is done by then.
        """
        ends = in_flight * (self.begin + self.passed) + self.buffers
        if not recompute:
            return ends + in_flight * (sum(self.blocks) + self.end)
        return ends + in_flight * len(self.blocks) * self.block_input + max(self.end, *self.blocks)

    def workspace(self, in_flight: int, recompute: bool) -> int:
        """What is held beside that at the worst moment: the logits with the loss, or gradients in the last block."""
        most = self.most(in_flight, recompute)
        rest = most - (max(self.end, *self.blocks) if recompute else self.end)
        last = max(self.blocks) if recompute else 0
        return max(rest + self.end + self.logits, rest + last + self.inner) - most


def in_flight(layout: Layout, stage: int) -> int:
    """Micro-batches of a stage between forward and backward when most are, in 1F1B order."""
    return min(layout.pipe_size - stage, layout.accumulation)


def kept_by_micro_batch(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int = 0) -> Kept:
    """What autograd keeps of one micro-batch on a rank of a pipeline stage."""
    own, last = layout.own_tokens * (config.hidden_size or 0) * layout.low, stage == layout.pipe_size - 1
    logits = layout.tokens * head_rows(config, layout.tensor_size) * layout.low
    finished = min(2, layout.accumulation - 1) if last and layout.pipe_size > 1 else 0
    of_block: dict[int, list[Projection]] = {number: [] for number in stage_blocks(config, adapters, layout, stage)}
    for projection in all_projections(config, adapters):
        if projection.block in of_block:
            of_block[projection.block].append(projection)
    return Kept(
        blocks=[_block(config, layout, projections) for projections in of_block.values()],
        block_input=own,
        begin=_begin(config, layout) if stage == 0 else 0,
        end=_end(config, layout) if last else 0,
        logits=logits * min(layout.pipe_size, 2) if last and layout.bf16 else 0,
        inner=2 * own + layout.tokens * share(config.ffn_hidden_size or 0, 0, layout.tensor_size).padded * layout.low,
        passed=0 if last else own,
        buffers=own * ((stage > 0) + (not last)) + finished * (logits + 2 * own),
    )


def _block(config: ModelConfig, layout: Layout, projections: Sequence[Projection]) -> int:
    qkv, o, up, down = projections
    norms = 2 * _norm(config, layout)
    if architecture(config).parallel_residual:
        norms -= layout.own_tokens * (config.hidden_size or 0) * layout.low
    total = norms + _column_input(config, layout, qkv) + _attention(config, layout, qkv) + _narrow(layout, o)
    total += _column_input(config, layout, up) + _narrow(layout, down)
    ffn = local_sizes(down, layout)[0][1]
    return total + layout.tokens * layout.low * ffn * _widths_of_mlp(config)


def _widths_of_mlp(config: ModelConfig) -> int:
    """Tensors [N, F] that the activation and the last product of an MLP keep."""
    shape = architecture(config)
    if shape.gated:
        return 5
    return 1 if shape.activation is F.relu else 2


def _norm(config: ModelConfig, layout: Layout) -> int:
    """A norm with its input."""
    tokens, wide = layout.own_tokens, layout.own_tokens * (config.hidden_size or 0)
    if architecture(config).norm != "RMSNorm":
        return wide * layout.low + 2 * tokens * (FLOAT if layout.accelerator else layout.low)
    return tokens * FLOAT + (wide * layout.low if layout.accelerator else 2 * wide * FLOAT)


def _column_input(config: ModelConfig, layout: Layout, projection: Projection) -> int:
    """The input of a column-parallel product, and the narrow product."""
    gathered = projection.adapted and not layout.rides(projection.kind)
    tokens = layout.tokens if gathered else layout.own_tokens
    return layout.low * tokens * (config.hidden_size or 0) + _narrow(layout, projection)


def _narrow(layout: Layout, projection: Projection) -> int:
    """u of the factors of a projection, and the factors joined with their snapshots."""
    tokens = layout.own_tokens if layout.rides(projection.kind) and not projection.by_rows else layout.tokens
    sizes = zip(projection.matrices, local_sizes(projection, layout), strict=True)
    joined = sum(matrix.width * (rows + columns) for matrix, (rows, columns) in sizes if matrix.snapshot)
    return layout.low * (tokens * projection.width + joined)


def _attention(config: ModelConfig, layout: Layout, qkv: Projection) -> int:
    """Queries, keys and values, what is rotated of them, the output and the logarithms of the kernel's sums."""
    queries, keys, values = (rows for rows, _ in local_sizes(qkv, layout))
    width, heads = queries + keys + values + queries, (config.num_attention_heads or 0) // layout.tensor_size
    constants = 0
    if architecture(config).rotary_percent is not None:
        width += queries + keys
        constants = 4 * layout.seq_length * config.rotary_width() * layout.low
    return layout.tokens * (width * layout.low + heads * FLOAT) + constants


def _begin(config: ModelConfig, layout: Layout) -> int:
    """What the word embedding, and learned positions, keep."""
    tokens = INTEGER * layout.micro_batch * (layout.seq_length + (1 if config.num_labels is None else 2))
    if layout.tensor_size > 1:
        tokens = (INTEGER + 1) * layout.tokens
    learned = architecture(config).rotary_percent is None
    return tokens + learned * INTEGER * layout.own_tokens // max(layout.micro_batch, 1)


def _end(config: ModelConfig, layout: Layout) -> int:
    """What the last norm, the head and the loss keep; a rank with padding in its vocabulary keeps a mask of it too."""
    head = _norm(config, layout) + layout.own_tokens * (config.hidden_size or 0) * layout.low
    if config.num_labels is not None:
        return head + _task_loss(config.num_labels, layout)
    return head + layout.tokens * (FLOAT * head_rows(config, layout.tensor_size) + INTEGER + 1)


def _task_loss(outputs: int, layout: Layout) -> int:
    """Where the last tokens are; then value and target, or probabilities, their sum, and labels if no tokens are kept.

    Labels are columns of the rows that hold the tokens, but for later stages, which get lengths and labels alone.
    """
    places = layout.micro_batch * (2 * INTEGER + layout.splits_sequence)
    if outputs == 1:
        return places + layout.micro_batch * 2 * FLOAT
    columns = 2 if layout.pipe_size > 1 else layout.seq_length + 2 if layout.tensor_size > 1 else 0
    return places + FLOAT + layout.micro_batch * (outputs * FLOAT + columns * INTEGER)
