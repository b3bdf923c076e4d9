"""Ranks of test_mappings: every mapping on contiguous and other tensors, against sums and pieces made by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from megalowrank.parallel.mappings import gather_rows, reduce_output, reduce_rows, start_gather, start_reduce
from megalowrank.parallel.traffic import Traffic
from megalowrank.parallel.wire import Wire

ROWS, BATCH, WIDTH = 6, 2, 5


class Checked(Traffic):
    """Traffic that takes contiguous tensors only: gloo copes with others, NCCL does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        assert func.namespace != "c10d" or all(tensor.is_contiguous() for tensor in tensors), func
        return super().__torch_dispatch__(func, types, args, kwargs)


def drawn(name: str, rank: int, rows: int = ROWS) -> torch.Tensor:
    """A tensor [rows, BATCH, WIDTH] that every rank can make for every rank."""
    source = torch.Generator().manual_seed(100 * len(name) + rank)
    return torch.randn(rows, BATCH, WIDTH, dtype=torch.float64, generator=source)


def layouts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    wide = torch.zeros(*value.shape[:-1], 2 * WIDTH, dtype=value.dtype)
    wide[..., ::2] = value
    return {
        "contiguous": value.clone(),
        "transposed": value.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": wide[..., ::2],
        "a part of wider rows": torch.cat((value, value), -1)[..., :WIDTH],
    }


def wires() -> dict[str, Wire]:
    """The world with and without sequence parallelism."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: Wire(dist.group.WORLD, rank, size, sequence=name == "sequence") for name in ("whole", "sequence")}


def own(whole: torch.Tensor, wire: Wire) -> torch.Tensor:
    return whole.chunk(wire.size)[wire.rank] if wire.sequence else whole


def autograd(name: str, wire: Wire) -> dict[str, bool]:
    """``reduce_output``: the sum or this rank's rows of it, its gradient, and an input left alone."""
    total = sum(drawn("x", rank) for rank in range(wire.size))
    answer = {}
    for layout, value in layouts(drawn("x", wire.rank)).items():
        x, before = value.requires_grad_(), value.detach().clone()
        y = reduce_output(x, wire)
        whole_gradient = drawn("gradient", 0)
        y.backward(layouts(own(whole_gradient, wire))[layout])
        answer[f"{name}, {layout}: sum"] = close(y, own(total, wire))
        answer[f"{name}, {layout}: contiguous"] = y.is_contiguous()
        answer[f"{name}, {layout}: gradient"] = bool(torch.equal(x.grad, whole_gradient))
        answer[f"{name}, {layout}: input"] = bool(torch.equal(x.detach(), before))
    expanded = reduce_output(x, wire)
    x.grad = None
    expanded.sum().backward()
    answer[f"{name}: gradient of a plain sum"] = bool(torch.equal(x.grad, torch.ones_like(x)))
    return answer


def raw(name: str, wire: Wire) -> dict[str, bool]:
    """The collectives themselves, finished at once and later."""
    total = sum(drawn("x", rank) for rank in range(wire.size))
    joined = torch.cat([drawn("part", rank) for rank in range(wire.size)])
    answer = {}
    for layout, value in layouts(drawn("x", wire.rank)).items():
        answer[f"{name}, {layout}: reduce"] = close(reduce_rows(value.clone(), wire), own(total, wire))
        pending = start_reduce(value, wire)
        answer[f"{name}, {layout}: reduce later"] = close(pending.wait(), own(total, wire)) and equal_waits(pending)
    for layout, value in layouts(drawn("part", wire.rank)).items():
        expected = joined if wire.sequence else value
        answer[f"{name}, {layout}: gather"] = bool(torch.equal(gather_rows(value, wire), expected))
        answer[f"{name}, {layout}: gather later"] = bool(torch.equal(start_gather(value, wire).wait(), expected))
    small = torch.full((wire.size, 2), 1.5, dtype=torch.bfloat16)
    answer[f"{name}: bfloat16"] = bool((reduce_rows(small, wire) == 1.5 * wire.size).all())
    return answer


def equal_waits(pending: Any) -> bool:
    """Waiting twice gives the same tensor."""
    return pending.wait() is pending.wait()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).detach().abs().max()) <= 1e-14


def volumes(wire: Wire) -> dict[str, list[int]]:
    """[calls, bytes] of one ``reduce_output`` and its backward pass."""
    x = drawn("x", wire.rank).requires_grad_()
    with Traffic({tuple(range(wire.size)): "tensor"}) as traffic:
        reduce_output(x, wire).sum().backward()
    return {name: [volume.calls, volume.payload] for (_, name), volume in traffic.take().items()}


def everything(payload: Any) -> dict[str, Any]:
    """Checks by name, and traffic."""
    found = wires()
    checks = {}
    with Checked({}):
        for name, wire in found.items():
            checks |= autograd(name, wire) | raw(name, wire)
    return {"checks": checks, "traffic": {name: volumes(wire) for name, wire in found.items()}}
