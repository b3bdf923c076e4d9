"""The matrices, tables and norms of a model as numbers: what all other arithmetic is made from.

A model configuration is one that ``apply_preset`` returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.config import ModelConfig
from megalowrank.lowrank.select import adapted, check_patterns
from megalowrank.methods.base import Adapters
from megalowrank.models.architecture import architecture
from megalowrank.models.projections import check_table, input_width, projections
from megalowrank.parallel.partition import share


@dataclass(frozen=True)
class Matrix:
    """A logical matrix W [rows, columns] of a block; ``rank`` is that of its factors, None for a trained W.

    Rank 0 is a frozen W without factors.

    ``trained``: whether A and B have gradients. ``snapshot``: there is a second pair of factors without.
    """

    name: str
    rows: int
    columns: int
    rank: int | None
    trained: tuple[bool, bool] = (True, True)
    snapshot: bool = False

    @property
    def numel(self) -> int:
        """Elements of W."""
        return self.rows * self.columns

    @property
    def factors(self) -> int:
        """Elements of A and B, and of their snapshots."""
        return self.width * (self.rows + self.columns)

    @property
    def fixed(self) -> int:
        """Elements of the factors without gradient."""
        return self.factors - (self.rank or 0) * (self.columns * self.trained[0] + self.rows * self.trained[1])

    @property
    def width(self) -> int:
        """Elements of the narrow product of a token: the rank, twice with snapshots."""
        return (self.rank or 0) * (2 if self.snapshot else 1)

    @property
    def spare(self) -> int:
        """Candidates of each factor: min(m, n) - r, never below 0."""
        return max(0, min(self.rows, self.columns) - self.rank) if self.rank else 0


@dataclass(frozen=True)
class Projection:
    """A fused projection of block ``block``: the logical matrices that share one W, and so a schedule.

    ``kind`` is its name within the block, such as attention.qkv.
    """

    block: int
    kind: str
    matrices: tuple[Matrix, ...]

    @property
    def adapted(self) -> bool:
        """Whether W is frozen."""
        return self.matrices[0].rank is not None

    @property
    def width(self) -> int:
        """Elements of the narrow products of a token, all matrices together."""
        return sum(matrix.width for matrix in self.matrices)

    @property
    def by_rows(self) -> bool:
        """Whether tensor parallelism splits its output (column-parallel) and not its input (row-parallel)."""
        return self.kind not in ("attention.o", "mlp.down")


def all_projections(config: ModelConfig, adapters: Adapters | None) -> list[Projection]:
    """The fused projections of all blocks in the order of computation.

    Raises ConfigError for patterns that match nothing or split a projection.
    """
    found, names = [], []
    for number in range(config.num_layers or 0):
        for kind, parts in projections(config).items():
            logical = [f"layers.{number}.{kind.split('.')[0]}.{part}" for part, _ in parts]
            names += logical
            chosen = adapters is not None and adapted(kind, logical, adapters.patterns)
            sizes = zip(logical, (rows for _, rows in parts), strict=True)
            columns = input_width(config, kind)
            matrices = tuple(_matrix(name, rows, columns, adapters if chosen else None) for name, rows in sizes)
            found.append(Projection(number, kind, matrices))
    if adapters is not None:
        check_patterns(adapters.patterns, names)
        reached = [matrix.name for projection in found for matrix in projection.matrices if matrix.rank]
        check_table(config, adapters, names, reached)
    return found


def _matrix(name: str, rows: int, columns: int, adapters: Adapters | None) -> Matrix:
    if adapters is None:
        return Matrix(name, rows, columns, None)
    spec = adapters.spec_of(name)
    if spec is None:
        return Matrix(name, rows, columns, 0, (False, False))
    return Matrix(name, rows, columns, spec.rank, spec.trained(rows, columns), spec.snapshot)


def tables(config: ModelConfig) -> list[int]:
    """Elements of the embeddings of tokens and of positions, and of the head where it has its own."""
    shape, hidden, vocabulary = architecture(config), config.hidden_size or 0, config.vocab_size or 0
    found = [hidden * vocabulary]
    if shape.rotary_percent is None:
        found.append(hidden * (config.max_position_embeddings or 0))
    return found if shape.tied_output else [*found, hidden * head_rows(config)]


def head_rows(config: ModelConfig, ranks: int = 1) -> int:
    """Rows of the head on each of ``ranks`` that share the vocabulary, padding included; a task's head is whole."""
    if config.num_labels is not None:
        return config.num_labels
    return share(config.vocab_size or 0, 0, ranks).padded


def norm_vectors(config: ModelConfig) -> int:
    """Vectors of one norm: a weight, and a bias where it has one."""
    return 1 if architecture(config).norm == "RMSNorm" else 2
