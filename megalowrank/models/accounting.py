"""Parameters, FLOPs and bytes of a run as plain arithmetic: no tensor is made and no process group is needed.

Bytes follow ``engine/zero_state.py``: what one rank holds of each category, without activations, communication
buckets and the temporaries inside an update. A model configuration is one that ``apply_preset`` returns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megalowrank.config import ModelConfig
from megalowrank.lowrank.select import adapted, check_patterns
from megalowrank.methods.base import Adapters
from megalowrank.models.architecture import architecture
from megalowrank.models.transformer import projections

GROUPS = ("embedding", "attention", "mlp", "norms", "output", "factors")
CATEGORIES = ("weights", "frozen W", "fold residual", "masters", "moments", "gradients", "offload staging")
RESIDUAL_BYTES = {"none": 0, "int8": 1, "int16": 2}

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


@dataclass(frozen=True)
class Matrix:
    """A logical matrix W [rows, columns] of a block; ``rank`` is that of its factors, None for a trained W."""

    name: str
    rows: int
    columns: int
    rank: int | None

    @property
    def numel(self) -> int:
        """Elements of W."""
        return self.rows * self.columns

    @property
    def factors(self) -> int:
        """Elements of A and B."""
        return (self.rank or 0) * (self.rows + self.columns)


def fused_matrices(config: ModelConfig, adapters: Adapters | None) -> list[tuple[Matrix, ...]]:
    """The fused projections of all blocks, as the logical matrices that share one W.

    Raises ConfigError for patterns that match nothing or split a projection.
    """
    found, names = [], []
    for number in range(config.num_layers or 0):
        for projection, parts in projections(config).items():
            logical = [f"layers.{number}.{projection.split('.')[0]}.{part}" for part, _ in parts]
            names += logical
            chosen = adapters is not None and adapted(projection, logical, adapters.patterns)
            rank = adapters.spec.rank if adapters is not None and chosen else None
            columns = (config.ffn_hidden_size if projection == "mlp.down" else config.hidden_size) or 0
            found.append(
                tuple(Matrix(name, rows, columns, rank) for name, (_, rows) in zip(logical, parts, strict=True))
            )
    if adapters is not None:
        check_patterns(adapters.patterns, names)
    return found


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the model: ``adapted`` are the frozen W, ``candidates`` those of a full switching pool.

    ``groups`` splits the total into embedding (with learned positions), attention, mlp, norms, output (0 where it
    is the embedding) and factors. Candidates are no parameters: they count in neither.
    """

    total: int
    trainable: int
    adapted: int
    factors: int
    candidates: int
    groups: dict[str, int]


def count_parameters(config: ModelConfig, adapters: Adapters | None) -> ParameterCount:
    """Count from the shapes alone. Raises ConfigError for bad patterns."""
    groups = dict.fromkeys(GROUPS, 0)
    shape, tables = architecture(config), _tables(config)
    groups["output"] = 0 if shape.tied_output else tables.pop()
    groups["embedding"] = sum(tables)
    groups["norms"] = sum(_norms(config))
    frozen = candidates = 0
    for matrix in (matrix for fused in fused_matrices(config, adapters) for matrix in fused):
        groups[matrix.name.split(".")[2]] += matrix.numel + matrix.rows * shape.biases
        groups["factors"] += matrix.factors
        if matrix.rank is not None:
            frozen += matrix.numel
            candidates += _spare(matrix) * (matrix.rows + matrix.columns)
    total = sum(groups.values())
    return ParameterCount(total, total - frozen, frozen, groups["factors"], candidates, groups)


def _tables(config: ModelConfig) -> list[int]:
    """Elements of the embeddings of tokens and of positions, and of the head where it has its own."""
    shape, hidden, vocabulary = architecture(config), config.hidden_size or 0, config.vocab_size or 0
    tables = [hidden * vocabulary]
    if shape.rotary_percent is None:
        tables.append(hidden * (config.max_position_embeddings or 0))
    return tables if shape.tied_output else [*tables, hidden * vocabulary]


def _norms(config: ModelConfig) -> list[int]:
    """Elements of the vectors of all norms."""
    vectors = 1 if architecture(config).norm == "RMSNorm" else 2
    return [config.hidden_size or 0] * (vectors * (2 * (config.num_layers or 0) + 1))


def _spare(matrix: Matrix) -> int:
    """Candidates of each factor: min(m, n) - r, never below 0."""
    return max(0, min(matrix.rows, matrix.columns) - (matrix.rank or 0))


def flops_breakdown(
    config: ModelConfig, adapters: Adapters | None, seq_length: int, recompute: bool = False
) -> dict[str, float]:
    """FLOPs per token of forward and backward by part: linear, factors, attention, output, recompute.

    Matrix products alone, 2·m·n per token for W [m, n]. A trained W costs 2 + 4 times m·n, a frozen one 2 + 2
    (no gradient of W), rank-r factors 2·r·(m+n) + 4·r·(m+n). Attention is causal and counted as such: half of
    4·S·H forward and twice that backward, S tokens long, H wide; what a fused kernel computes again in its
    backward pass is not work the model asks for. ``recompute`` repeats the forward pass of the blocks, less a plain
    down projection: torch stops before it, because nobody needs its result.
    """
    matrices = [matrix for fused in fused_matrices(config, adapters) for matrix in fused]
    forward = 2.0 * sum(matrix.numel for matrix in matrices)
    backward = sum((4.0 if matrix.rank is None else 2.0) * matrix.numel for matrix in matrices)
    factors = 2.0 * sum(matrix.factors for matrix in matrices)
    attention = 2.0 * seq_length * (config.hidden_size or 0) * (config.num_layers or 0)
    skipped = 2.0 * sum(m.numel for m in matrices if m.rank is None and m.name.endswith(".down"))
    return {
        "linear": forward + backward,
        "factors": 3.0 * factors,
        "attention": 3.0 * attention,
        "output": 6.0 * (config.vocab_size or 0) * (config.hidden_size or 0),
        "recompute": forward + factors + attention - skipped if recompute else 0.0,
    }


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


@dataclass(frozen=True)
class Layout:
    """What decides which bytes a rank holds. ``residual`` is none, int8 or int16 and counts only with ``bf16``.

    ``stage`` None is the dense engine. ``candidates`` is where a method keeps them: host, device or None.
    ``persistence_threshold`` in elements is ZeRO-3's: smaller parameters stay whole on every rank.
    """

    stage: int | None
    bf16: bool
    data_size: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    residual: str = "int16"
    candidates: str | None = None
    persistence_threshold: int = 100_000


@dataclass
class Bytes:
    """Bytes of one category on one rank: on the device that computes, and in host memory."""

    device: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.device + self.host

    def add(self, numbers: int, on_host: bool = False) -> None:
        """Count ``numbers`` more bytes."""
        if on_host:
            self.host += numbers
        else:
            self.device += numbers


@dataclass
class _Sizes:
    """Elements of every parameter as torch sees it, trained and frozen ones."""

    trained: list[int] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)


def _sizes(config: ModelConfig, adapters: Adapters | None) -> _Sizes:
    sizes, biases = _Sizes(_tables(config) + _norms(config)), architecture(config).biases
    for fused in fused_matrices(config, adapters):
        weight, rank = sum(matrix.numel for matrix in fused), fused[0].rank
        if biases:
            sizes.trained.append(sum(matrix.rows for matrix in fused))
        (sizes.trained if rank is None else sizes.frozen).append(weight)
        for matrix in fused if rank is not None else ():
            sizes.trained += [matrix.factors * side // (matrix.rows + matrix.columns)
                              for side in (matrix.columns, matrix.rows)]  # fmt: skip
    return sizes


def predicted_bytes(config: ModelConfig, adapters: Adapters | None, layout: Layout) -> dict[str, Bytes]:
    """Bytes of the first rank by category, as ``engine.memory.measured_bytes`` names them.

    ``weights`` is what the forward pass reads of trained parameters, ``frozen W`` of the others. ``gradients`` is
    the most that is held of them, as the backward pass ends or while AdamW runs; between updates they are mostly
    gone. With ``offload_optimizer`` more than one micro-batch needs host memory for whole gradients besides.
    Raises ConfigError for bad patterns.
    """
    sizes = _sizes(config, adapters)
    found = {name: Bytes() for name in CATEGORIES}
    low = 2 if layout.bf16 else 4
    residual = RESIDUAL_BYTES[layout.residual] if layout.bf16 else 0
    for numel in sizes.trained:
        _add_weight(found["weights"], numel, low, layout)
    for numel in sizes.frozen:
        _add_weight(found["frozen W"], numel, low, layout)
        kept, on_host = _folded(numel, layout)
        found["fold residual"].add(kept * residual, on_host)
    _add_state(found, sizes.trained, low, layout)
    if layout.candidates is not None:
        kept = sum(
            -(-_spare(matrix) // layout.data_size) * (matrix.rows + matrix.columns)
            for fused in fused_matrices(config, adapters) for matrix in fused if matrix.rank is not None
        )  # fmt: skip
        found[f"candidates ({layout.candidates})"] = Bytes()
        found[f"candidates ({layout.candidates})"].add(4 * kept, layout.candidates == "host")
    return found


def _add_weight(count: Bytes, numel: int, low: int, layout: Layout) -> None:
    """A parameter as the forward pass reads it: whole, or under ZeRO-3 a shard and, if small, whole as well."""
    if layout.stage != 3:
        count.add(numel * low)
        return
    count.add(-(-numel // layout.data_size) * low, layout.offload_param)
    if numel <= layout.persistence_threshold and layout.data_size > 1:
        count.add(numel * low)


def _folded(numel: int, layout: Layout) -> tuple[int, bool]:
    """(elements of a frozen W that this rank folds, whether they are in host memory)."""
    if layout.stage != 3 or numel <= layout.persistence_threshold:
        return numel, False
    return -(-numel // layout.data_size), layout.offload_param


def _add_state(found: dict[str, Bytes], trained: list[int], low: int, layout: Layout) -> None:
    """Masters, moments and gradients; all float32 but the gradients that the backward pass leaves."""
    stage, host = layout.stage or 0, layout.offload_optimizer
    if stage == 3:
        part = sum(-(-numel // layout.data_size) for numel in trained)
    else:
        part = -(-sum(trained) // (2 * layout.data_size)) * 2 if stage else sum(trained)
    found["masters"].add(4 * part if stage or layout.bf16 else 0, host)
    found["moments"].add(8 * part, host)
    if host and stage in (1, 2):
        found["gradients"].add(4 * part, on_host=True)
        found["offload staging"].add(low * (part + max(trained)), on_host=True)
        found["offload staging"].add(low * max(trained))
        return
    held = {
        0: (low + 4 + 4 * layout.bf16) * part,
        1: max(low * sum(trained), 4 * part),
        2: 4 * part,
        3: (low + 4) * part,
    }
    found["gradients"].add(held[stage], host)


def startup_table(config: ModelConfig, adapters: Adapters | None, layout: Layout) -> str:
    """Parameters, trainable share and predicted bytes of one rank as aligned lines of text."""
    count = count_parameters(config, adapters)
    lines = [f"{'parameters':<24}{'elements':>14}{'share':>9}"]
    lines += [_parameter_line(name, count.groups[name], count.total) for name in GROUPS if count.groups[name]]
    lines += [_parameter_line("total", count.total, count.total)]
    lines += [_parameter_line("trainable", count.trainable, count.total)]
    rows = predicted_bytes(config, adapters, layout)
    lines += ["", f"{'memory of one rank':<24}{'device':>14}{'host':>14}"]
    shown = {name: size for name, size in rows.items() if size.total}
    lines += [f"{name:<24}{human(size.device):>14}{human(size.host):>14}" for name, size in shown.items()]
    device, host = sum(size.device for size in rows.values()), sum(size.host for size in rows.values())
    lines += [f"{'sum, no activations':<24}{human(device):>14}{human(host):>14}"]
    return "\n".join(lines)


def _parameter_line(name: str, numel: int, total: int) -> str:
    return f"{name:<24}{numel:>14,}{100 * numel / total:>8.2f}%"


def human(size: float) -> str:
    """Bytes in binary units; a dash for nothing."""
    if not size:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
