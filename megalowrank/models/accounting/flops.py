"""FLOPs of forward and backward passes, per token, from the shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.shapes import Matrix, Projection, all_projections, head_rows

# Dense tensor-core peaks in FLOP/s (no sparsity): bfloat16, and float16 for the V100, which has no bfloat16. From
# NVIDIA's data sheets. The first pattern that fits wins; a slice of a card (MIG) is not in the table.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bG?H[12]00\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bL40S\b", 362e12),
    (r"\bV100-PCIE\b", 112e12),
    (r"\bV100\b", 125e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of an accelerator by its name (``torch.cuda.get_device_name``); None if it is not known."""
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, device_name, re.IGNORECASE)), 0.0)
    return peak or None


def flops_breakdown(
    config: ModelConfig, adapters: Adapters | None, seq_length: int, recompute: bool = False
) -> dict[str, float]:
    """FLOPs per token of forward and backward by part: linear, factors, attention, output, recompute.

    Matrix products alone, 2·m·n per token for W [m, n]. A trained W costs 2 + 4 times m·n, a frozen one 2 + 2
    (no gradient of W), rank-r factors 2·r·(m+n) + 2·r·(m+n) and as much again for gradients of those that are trained;
    with snapshots r counts twice. Attention is causal and counted as such: half of
    4·S·H forward and twice that backward, S tokens long, H wide; what a fused kernel computes again in its
    backward pass is not work the model asks for. ``recompute`` repeats the forward pass of the blocks, less a plain
    down projection: torch stops before it, because nobody needs its result.
    """
    found = _of_blocks(config, all_projections(config, adapters), config.num_layers or 0, seq_length, recompute)
    return {**found, "output": head_flops(config)}


def head_flops(config: ModelConfig) -> float:
    """FLOPs per token of the head, forward and backward."""
    return 6.0 * head_rows(config) * (config.hidden_size or 0)


def block_flops(
    config: ModelConfig, adapters: Adapters | None, seq_length: int, recompute: bool = False
) -> list[float]:
    """FLOPs per token of every block, forward and backward; 0 as ``seq_length`` leaves attention out."""
    blocks: list[list[Projection]] = [[] for _ in range(config.num_layers or 0)]
    for projection in all_projections(config, adapters):
        blocks[projection.block].append(projection)
    return [sum(_of_blocks(config, block, 1, seq_length, recompute).values()) for block in blocks]


def _of_blocks(
    config: ModelConfig, projections: Iterable[Projection], blocks: int, seq_length: int, recompute: bool
) -> dict[str, float]:
    """``flops_breakdown`` of these projections and the attention of ``blocks`` blocks."""
    matrices = [matrix for projection in projections for matrix in projection.matrices]
    forward = 2.0 * sum(matrix.numel for matrix in matrices)
    backward = sum((4.0 if matrix.rank is None else 2.0) * matrix.numel for matrix in matrices)
    factors = 2.0 * sum(matrix.factors for matrix in matrices)
    gradients = sum(factor_gradients(matrix, matrix.rows, matrix.columns) for matrix in matrices)
    attention = 2.0 * seq_length * (config.hidden_size or 0) * blocks
    skipped = 2.0 * sum(m.numel for m in matrices if m.rank is None and m.name.endswith(".down"))
    return {
        "linear": forward + backward,
        "factors": 2.0 * factors + gradients,
        "attention": 3.0 * attention,
        "recompute": forward + factors + attention - skipped if recompute else 0.0,
    }


def factor_gradients(matrix: Matrix, rows: float, columns: float) -> float:
    """FLOPs per token of the gradients of A and B, whose vectors have ``columns`` and ``rows`` elements here."""
    train_A, train_B = matrix.trained
    return 2.0 * matrix.width * (columns * train_A + rows * train_B)


def flops_per_token(config: ModelConfig, adapters: Adapters | None, seq_length: int, recompute: bool = False) -> float:
    """FLOPs that one token of training costs; ``flops_breakdown`` says what is counted.

    MFU divides this number without ``recompute`` (the work the method needs) by time and peak; HFU divides the
    number with it (the work that is done).
    """
    return sum(flops_breakdown(config, adapters, seq_length, recompute).values())


def model_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs per token of the same model trained at full rank: 6·N (matrices and head) + attention.

    This is no MFU of a low-rank run, which needs less: it is for tokens per second against full rank.
    """
    return flops_per_token(config, None, seq_length)
