"""Parameters of a model by group, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from megalowrank.config import ModelConfig
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.shapes import all_projections, norm_vectors, tables
from megalowrank.models.architecture import architecture
from megalowrank.models.projections import shortcut_specs

GROUPS = ("embedding", "attention", "mlp", "norms", "output", "factors")


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the model: ``adapted`` are the frozen W, ``candidates`` those of a full switching pool.

    ``fixed`` are the factors without gradient: projectors and snapshots.
    ``groups`` splits the total into embedding (with learned positions), attention, mlp, norms, output (0 where it
    is the embedding) and factors. Candidates are no parameters: they count in neither.
    """

    total: int
    trainable: int
    adapted: int
    factors: int
    fixed: int
    candidates: int
    groups: dict[str, int]


def count_parameters(config: ModelConfig, adapters: Adapters | None) -> ParameterCount:
    """Count from the shapes alone. Raises ConfigError for bad patterns."""
    groups = dict.fromkeys(GROUPS, 0)
    shape, found = architecture(config), tables(config)
    groups["output"] = 0 if shape.tied_output else found.pop()
    groups["embedding"] = sum(found)
    groups["norms"] = (config.hidden_size or 0) * norm_vectors(config) * (2 * (config.num_layers or 0) + 1)
    frozen = fixed = candidates = 0
    for matrix in (matrix for fused in all_projections(config, adapters) for matrix in fused.matrices):
        groups[matrix.name.split(".")[2]] += matrix.numel + matrix.rows * shape.biases
        groups["factors"] += matrix.factors
        if matrix.rank is not None:
            frozen, fixed = frozen + matrix.numel, fixed + matrix.fixed
            candidates += matrix.spare * (matrix.rows + matrix.columns)
    width = 2 * (config.hidden_size or 0)
    groups["factors"] += sum(spec.rank * width for spec in shortcut_specs(config, adapters).values())
    total = sum(groups.values())
    trainable = total - frozen - fixed
    if adapters is not None and adapters.frozen:
        trainable = groups["factors"] - fixed
    return ParameterCount(total, trainable, frozen, groups["factors"], fixed, candidates, groups)
