"""Three ranks that call the collectives of the project, in the whole job and in a group of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.errors import ConfigError
from megalowrank.parallel.collectives import all_true, from_first_rank, group_size, mean_over, sum_over

TEXTS = ("", "a", "+-", "größer ☃ 你好", "line\nline", "x" * 100_000)
PAIR = (1, 2)


def answers(payload: Any) -> dict[str, Any]:
    """What this rank gets from each collective."""
    rank = dist.get_rank()
    pair = dist.new_group(list(PAIR))
    found: dict[str, Any] = {"world": inside(dist.group.WORLD, rank)}
    if rank in PAIR:
        found["pair"] = inside(pair, rank)
    found["alone"] = inside(None, 0)
    return found


def inside(group: Any, rank: int) -> dict[str, Any]:
    own = 0 if group is None else dist.get_rank(group)
    mean = torch.tensor([rank + 0.5, -rank], dtype=torch.float64)
    total = torch.tensor([rank, 2**40 + rank])
    returned = mean_over(mean, group), sum_over(total, group)
    return {
        "size": group_size(group),
        "mean": mean.tolist(),
        "sum": total.tolist(),
        "in place": returned[0] is mean and returned[1] is total,
        "all yes": all_true(True, group),
        "one no": [all_true(rank != no, group) for no in range(3)],
        "texts": [from_first_rank(saying(text, own), group, own) == text for text in TEXTS],
        "error": refusal(group, own),
        "after": from_first_rank(saying("still in step", own), group, own),
    }


def saying(text: str, own: int) -> Callable[[], str]:
    """A computation for the first rank of a group; on any other it fails."""

    def compute() -> str:
        assert own == 0, "only the first rank computes"
        return text

    return compute


def refusal(group: Any, own: int) -> str:
    def compute() -> str:
        raise ConfigError("--load is damaged ☃", own, "another")

    try:
        from_first_rank(compute, group, own)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"
