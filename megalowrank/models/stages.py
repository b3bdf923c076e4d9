"""Which blocks every stage of a pipeline computes: contiguous ranges of equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods.base import Adapters
from megalowrank.models.accounting.flops import block_flops, head_flops


def stage_costs(
    config: ModelConfig, adapters: Adapters | None, seq_length: int = 0, recompute: bool = False
) -> list[float]:
    """FLOPs per token of every block, the head with the last one; a look-up in an embedding costs none."""
    costs = block_flops(config, adapters, seq_length, recompute)
    costs[-1] += head_flops(config)
    return costs


def split_layers(
    config: ModelConfig, adapters: Adapters | None, stages: int, seq_length: int = 0, recompute: bool = False
) -> list[tuple[int, int]]:
    """Blocks [first, stop) of every stage, such that the dearest stage costs as little as possible.

    The first stage has the embedding besides, the last one the last norm and the head. Every stage has a block.
    0 as ``seq_length`` leaves attention out of the costs, which is the same for every block. Raises ConfigError if
    there are more stages than blocks. A pure function: every rank gets the same answer.
    """
    if stages > (config.num_layers or 0):
        raise ConfigError(
            "--pipeline-model-parallel-size has more stages than the model has layers", stages,
            f"<= --num-layers {config.num_layers}",
        )  # fmt: skip
    return split_evenly(stage_costs(config, adapters, seq_length, recompute), stages)


def split_evenly(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cut ``costs`` into ``parts`` contiguous ranges [first, stop) of at least one element, of least maximal sum.

    Of cuts with the same maximum it takes the one of least squares, and then the one with shorter ranges first: early
    stages hold the activations of more micro-batches.
    """
    return list(_cut(tuple(costs), parts))


@lru_cache(maxsize=32)
def _cut(costs: tuple[float, ...], parts: int) -> tuple[tuple[int, int], ...]:
    total, count = [0.0, *accumulate(costs)], len(costs)

    def merged(first: int, stop: int) -> tuple[float, float]:
        here, (most, squares) = total[stop] - total[first], rest[stop]
        return max(here, most), here * here + squares

    rest = {first: (total[count] - total[first], (total[count] - total[first]) ** 2) for first in range(count)}
    stops: list[dict[int, int]] = [dict.fromkeys(range(count), count)]
    for part in range(2, parts + 1):
        chosen = {
            first: min((merged(first, stop), stop) for stop in range(first + 1, count - part + 2))[1]
            for first in range(count - part + 1)
        }
        rest = {first: merged(first, stop) for first, stop in chosen.items()}
        stops.append(chosen)
    found, first = [], 0
    for chosen in reversed(stops):
        found.append((first, chosen[first]))
        first = chosen[first]
    return tuple(found)
