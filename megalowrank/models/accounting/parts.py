"""The parameters that one rank holds: what is split, what is replicated, what is padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.layout import Layout, stage_blocks
from megalowrank.models.accounting.shapes import Projection, all_projections, head_rows, norm_vectors
from megalowrank.models.architecture import architecture
from megalowrank.models.projections import shortcut_specs
from megalowrank.parallel.partition import share

_FACTORS = ("A", "B", "A_snapshot", "B_snapshot")


@dataclass(frozen=True)
class Part:
    """A parameter of a rank: ``numel`` elements with padding, in the module ``module``.

    ``vector``: it has one dimension. ``partial``: backward leaves a partial sum over tensor-parallel ranks as its
    gradient. ``folded``: it is a frozen W that folds change.
    """

    module: str
    name: str
    numel: int
    trained: bool = True
    vector: bool = False
    partial: bool = False
    folded: bool = False


def rank_parts(config: ModelConfig, adapters: Adapters | None, layout: Layout, stage: int = 0) -> list[Part]:
    """The parameters of every rank of a pipeline stage, in the order of the modules; a tied weight counts once.

    Raises ConfigError for bad patterns, and for more stages than blocks.
    """
    shape, hidden = architecture(config), config.hidden_size or 0
    first, last = stage == 0, stage == layout.pipe_size - 1
    table = hidden * share(config.vocab_size or 0, 0, layout.tensor_size).padded
    blocks = stage_blocks(config, adapters, layout, stage)
    inner: dict[int, list[Projection]] = {number: [] for number in blocks}
    for projection in all_projections(config, adapters):
        if projection.block in inner:
            inner[projection.block].append(projection)
    found: list[Part] = []
    if first or (last and shape.tied_output):
        found.append(Part("embedding", "weight", table))
    if first and shape.rotary_percent is None:
        positions = hidden * (config.max_position_embeddings or layout.seq_length)
        found.append(Part("position", "weight", positions, partial=layout.splits_sequence))
    shortcuts = shortcut_specs(config, adapters)
    for number, (qkv, o, up, down) in inner.items():
        found += _norm(config, layout, f"layers.{number}.input_layernorm")
        found += [*_linear(o, layout, shape.biases), *_linear(qkv, layout, shape.biases)]
        found += _norm(config, layout, f"layers.{number}.pre_mlp_layernorm")
        found += [*_linear(up, layout, shape.biases), *_linear(down, layout, shape.biases)]
        own = {name: spec for name, spec in shortcuts.items() if name.startswith(f"layers.{number}.")}
        found += _shortcuts(own, hidden, layout)
    if last:
        found += _norm(config, layout, "norm")
        found += [] if shape.tied_output else [_head(config, layout)]
    if adapters is not None and adapters.frozen:
        return [part if part.name in _FACTORS else replace(part, trained=False) for part in found]
    return found


def _shortcuts(specs: Mapping[str, LowRankSpec], hidden: int, layout: Layout) -> Iterator[Part]:
    """A and Bᵀ, whole on every rank."""
    for module, spec in specs.items():
        for side in "AB":
            yield Part(module, side, spec.rank * hidden, partial=layout.splits_sequence)


def _head(config: ModelConfig, layout: Layout) -> Part:
    """The output projection of the vocabulary or of a task; each rank has that of a task whole."""
    partial = layout.splits_sequence and config.num_labels is not None
    return Part("output", "weight", (config.hidden_size or 0) * head_rows(config, layout.tensor_size), partial=partial)


def _norm(config: ModelConfig, layout: Layout, module: str) -> list[Part]:
    names = ("weight", "bias")[: norm_vectors(config)]
    return [Part(module, name, config.hidden_size or 0, vector=True, partial=layout.splits_sequence) for name in names]


def local_sizes(projection: Projection, layout: Layout) -> list[tuple[int, int]]:
    """(rows, columns) of every logical matrix of a fused projection as a rank stores it."""
    ranks = layout.tensor_size
    if projection.by_rows:
        return [(share(m.rows, 0, ranks).padded, m.columns) for m in projection.matrices]
    return [(m.rows, share(m.columns, 0, ranks).padded) for m in projection.matrices]


def _linear(projection: Projection, layout: Layout, biases: bool) -> Iterator[Part]:
    """W, bias, A and Bᵀ of every matrix, their snapshots; the factor that is replicated may have a partial gradient."""
    module, sizes = f"layers.{projection.block}.{projection.kind}", local_sizes(projection, layout)
    rows, adapted = sum(rows for rows, _ in sizes), projection.adapted
    yield Part(module, "weight", sum(rows * columns for rows, columns in sizes), not adapted, folded=adapted)
    if biases:
        split = layout.splits_sequence and not projection.by_rows
        yield Part(module, "bias", rows, vector=True, partial=split)
    if not projection.adapted:
        return
    partial = layout.splits_sequence or (layout.tensor_size > 1 and not layout.rides(projection.kind))
    for matrix, (out, into) in zip(projection.matrices, sizes, strict=True):
        train_A, train_B, rank = *matrix.trained, matrix.rank or 0
        if not rank:
            continue
        yield Part(module, "A", rank * into, train_A, partial=partial and projection.by_rows)
        yield Part(module, "B", rank * out, train_B, partial=partial and not projection.by_rows)
        if matrix.snapshot:
            yield Part(module, "A_snapshot", rank * into, False)
            yield Part(module, "B_snapshot", rank * out, False)
