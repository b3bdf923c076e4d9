"""Ranks of test_linear_split: one parallel linear at a time against the dense layer in one process.

Every rank draws the whole tensors alike, builds its part, and compares its part of outputs and gradients with that of
plain autograd on whole matrices. N tokens are SEQUENCE · BATCH.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.utils.checkpoint import checkpoint

from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.parallel.partition import share
from megalowrank.parallel.wire import Wire, partial_parameters
from tests.parallel.mapping_cases import Checked

SEQUENCE, BATCH, SCALE = 8, 2, 0.37
Dense = dict[str, torch.Tensor]


def wire_of(case: dict[str, Any]) -> Wire:
    """The whole world as one tensor-parallel group."""
    sequence, ride = case.get("sequence", False), case.get("ride", True)
    return Wire(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sequence, ride)


def core_config(wire: Wire, dtype: torch.dtype) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=wire.size, sequence_parallel=wire.sequence and wire.size > 1, params_dtype=dtype,
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip


def build(case: dict[str, Any], wire: Wire, dtype: torch.dtype = torch.float64) -> Any:
    """The linear of a case, values not set. ``blocks``: (name, rows, rank or 0 without factors) of every matrix."""
    blocks = tuple((name, rows) for name, rows, _ in case["blocks"])
    spec = LowRankSpec(case["blocks"][0][2], SCALE) if case["blocks"][0][2] else None
    flags: dict[str, Any] = {"config": core_config(wire, dtype), "init_method": None, "bias": case.get("bias", False)}
    flags |= {"skip_bias_add": False, "blocks": blocks, "columns": case["columns"], "lowrank": spec, "wire": wire}
    if case["kind"] == "column":
        rows = sum(share(rows, 0, wire.size).padded for _, rows in blocks) * wire.size
        module = LowRankColumnParallelLinear(case["columns"], rows, **flags)
    else:
        columns = share(case["columns"], 0, wire.size).padded * wire.size
        module = LowRankRowParallelLinear(columns, sum(r for _, r in blocks), input_is_parallel=True, **flags)
    for (name, _, rank), factors in zip(case["blocks"], module.factors, strict=False):
        for parameter in (factors.A, factors.Bt):  # a matrix of another rank than the first
            parameter.data = parameter.data.new_zeros(rank, parameter.shape[1])
        assert getattr(module, f"A_{name}") is factors.A
    if module.weight.requires_grad:
        module.weight.requires_grad_(not case.get("frozen", False))
    return module


def draw(case: dict[str, Any]) -> Dense:
    """Whole tensors by name: x, dy, weight, bias, and A and B of every matrix; all leaves, exact in bfloat16."""
    source = torch.Generator().manual_seed(7)
    width, columns = sum(rows for _, rows, _ in case["blocks"]), case["columns"]
    shapes = {"x": (SEQUENCE, BATCH, columns), "dy": (SEQUENCE, BATCH, width), "weight": (width, columns)}
    if case.get("bias"):
        shapes["bias"] = (width,)
    for name, rows, rank in case["blocks"]:
        if rank:
            shapes |= {f"A_{name}": (rank, columns), f"B_{name}": (rank, rows)}
    whole = {name: torch.randn(shape, dtype=torch.float64, generator=source) for name, shape in shapes.items()}
    return {name: value.bfloat16().double().requires_grad_() for name, value in whole.items()}


@dataclass
class Cut:
    """Where a rank's parts lie in the whole tensors of a case."""

    module: Any
    wire: Wire
    column: bool

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output y, the input x or a parameter."""
        columns = self.module.columns
        if name in ("x", "y"):
            if self.column == (name == "x"):
                return whole.chunk(self.wire.size)[self.wire.rank] if self.wire.sequence else whole
            return columns.take(whole, 2) if name == "x" else self._rows(whole, 2)
        if name in ("weight", "bias"):
            rows = self._rows(whole, 0)
            return columns.take(rows, 1) if name == "weight" else rows
        return (columns if name[0] == "A" else dict(self.module.blocks)[name[2:]]).take(whole, 1)

    def _rows(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """The rank's part of every matrix' rows."""
        shares = [rows for _, rows in self.module.blocks]
        parts = whole.split([rows.size for rows in shares], dim)
        return torch.cat([rows.take(part, dim) for rows, part in zip(shares, parts, strict=True)], dim)


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def counted(module: Any, x: torch.Tensor, dy: torch.Tensor, wire: Wire) -> tuple[torch.Tensor, list[Any]]:
    """The output, and [calls, bytes] by collective of the forward and of the backward pass."""
    traffic = Checked({tuple(range(wire.size)): "tensor"})
    with traffic:
        y, _ = module(x)
        forward = traffic.take()
        y.backward(dy)
        backward = traffic.take()
    return y, [{name: [v.calls, v.payload] for (_, name), v in way.items()} for way in (forward, backward)]


def run(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Cut, dict[str, torch.Tensor], list[Any]]:
    """Forward and backward of a case: own output and gradients by name, and the traffic of both directions.

    Marked gradients come back summed over ranks.
    """
    wire = wire_of(case)
    module, whole = build(case, wire, dtype), draw(case)
    cut = Cut(module, wire, case["kind"] == "column")
    for name, parameter in module.named_parameters():
        parameter.data.copy_(cut.own(name, whole[name].detach()))
    x = strided(cut.own("x", whole["x"].detach()).to(dtype)).requires_grad_(case.get("input_gradient", True))
    dy = strided(cut.own("y", whole["dy"].detach()).to(dtype))
    y, counts = counted(module, x, dy, wire)
    for parameter in partial_parameters(module):
        dist.all_reduce(parameter.grad)
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return cut, {name: value for name, value in found.items() if value is not None}, counts


def dense(case: dict[str, Any]) -> Dense:
    """Output and gradients of y = x (W + s · B A)ᵀ + bias in one process."""
    whole = draw(case)
    W = whole["weight"]
    if case["blocks"][0][2]:
        W = W + SCALE * torch.cat([whole[f"B_{name}"].t() @ whole[f"A_{name}"] for name, _, _ in case["blocks"]])
    y = whole["x"] @ W.t()
    y = y + whole["bias"] if "bias" in whole else y
    y.backward(whole["dy"].detach())
    return {name: value.grad for name, value in whole.items() if name != "dy"} | {"y": y.detach()}


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest element of the reference."""
    if found.shape != reference.shape:
        return float("inf")
    return float((found - reference).abs().max() / reference.abs().max().clamp_min(1e-9)) if found.numel() else 0.0


def folded(case: dict[str, Any], cut: Cut) -> float:
    """Fold this rank's parts of drawn vectors into W and compare with its part of the dense sum; padding is exact."""
    source, sums = torch.Generator().manual_seed(11), []
    for layer in cut.module.factors:
        v = torch.randn(2, case["columns"], dtype=torch.float64, generator=source)
        u = torch.randn(2, layer.rows.size, dtype=torch.float64, generator=source)
        own_v, own_u = layer.own(v, u)
        layer.fold(own_u, own_v)
        sums.append(SCALE * u.t() @ v)
    weight, whole = cut.module.weight.detach(), draw(case)["weight"].detach() + torch.cat(sums)
    padding = weight[cut.own("weight", torch.ones_like(whole)) == 0]
    return relative(weight, cut.own("weight", whole)) if bool((padding == 0).all()) else float("inf")


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: the worst relative difference and the padding by tensor, marks, attributes and traffic."""
    reports = []
    for case in cases:
        (cut, found, traffic), reference = run(case), dense(case)
        marked = {id(parameter) for parameter in partial_parameters(cut.module)}
        parameters = list(cut.module.named_parameters())
        outside = {name: cut.own(name, torch.ones_like(reference[name])) == 0 for name in found}
        report = {
            "worst": {name: relative(value, cut.own(name, reference[name])) for name, value in found.items()},
            "padded": sum(int(mask.sum()) for mask in outside.values()),
            "padding": max(float(value[outside[name]].abs().sum()) for name, value in found.items()),
            "partial": [name for name, parameter in parameters if id(parameter) in marked],
            "split": {name: p.partition_dim for name, p in parameters if getattr(p, "tensor_model_parallel", False)},
            "traffic": traffic,
        }
        if case["blocks"][0][2]:
            _, other, _ = run({**case, "ride": not case["ride"]})
            report["schedules"] = max(relative(value, other[name]) for name, value in found.items())
            report["folded"] = folded(case, cut)
        reports.append(report)
    return reports


def core_traffic(cases: list[dict[str, Any]]) -> list[Any]:
    """Collectives of megatron-core's own linears, forward and backward; without sequence parallelism, which it has
    for CUDA alone."""
    found = []
    for case in cases:
        wire, rows = wire_of(case), sum(rows for _, rows, _ in case["blocks"])
        flags: dict[str, Any] = {"config": core_config(wire, torch.float64), "init_method": None, "bias": False}
        flags |= {"skip_bias_add": False, "tp_group": wire.group}
        if case["kind"] == "column":
            module = ColumnParallelLinear(case["columns"], rows, gather_output=False, **flags)
        else:
            module = RowParallelLinear(case["columns"], rows, input_is_parallel=True, **flags)
        torch.nn.init.ones_(module.weight)
        x = torch.ones(SEQUENCE, BATCH, module.weight.shape[1], dtype=torch.float64, requires_grad=True)
        found.append(counted(module, x, torch.ones(*x.shape[:-1], module.weight.shape[0], dtype=x.dtype), wire)[1])
    return found


def rounding(cases: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """bfloat16, by tensor: error of the parallel layer and of the same layer in one process, both against float64."""
    found = []
    for case in cases:
        cut, own, _ = run(case, torch.bfloat16)
        alone, reference = _one_process(case), dense(case)
        pairs = {name: (value, cut.own(name, alone[name])) for name, value in own.items()}
        found.append({
            name: [_error(value, cut.own(name, reference[name])) for value in pair] for name, pair in pairs.items()
        })  # fmt: skip
    return found


def _error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


def _one_process(case: dict[str, Any]) -> Dense:
    """Output and gradients of the layer on one rank, in bfloat16."""
    module, whole = build(case, Wire(), torch.bfloat16), draw(case)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(whole[name])
    x = whole["x"].detach().bfloat16().requires_grad_()
    y, _ = module(x)
    y.backward(whole["dy"].detach().bfloat16())
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def recomputed(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A column- and a row-parallel linear after each other, with and without activation checkpointing."""
    found = []
    for case in cases:
        wire = wire_of(case)
        first = build({**case, "kind": "column", "blocks": [["up", 7, 3]], "columns": 5}, wire)
        last = build({**case, "kind": "row", "blocks": [["down", 5, 2]], "columns": 7}, wire)
        both = torch.nn.Sequential(first, last)
        source = torch.Generator().manual_seed(3)
        for parameter in both.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=source))
        rows = SEQUENCE // wire.size if wire.sequence else SEQUENCE
        x = torch.randn(rows, BATCH, 5, dtype=torch.float64, generator=source).requires_grad_()
        results = []
        for again in (False, True):
            both.zero_grad()
            x.grad = None
            y = checkpoint(_chain, first, last, x, use_reentrant=False) if again else _chain(first, last, x)
            y.sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in both.parameters() if p.grad is not None)])
        equal = [bool(torch.equal(a, b)) for a, b in zip(*results, strict=True)]
        found.append({"equal": equal, "moved": float(x.grad.abs().max())})
    return found


def _chain(first: Any, last: Any, x: torch.Tensor) -> torch.Tensor:
    return last(torch.tanh(first(x)[0]))[0]


def everything(payload: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All of the above in one launch."""
    return {
        "compare": compare(payload["compare"]),
        "core": core_traffic(payload["core"]),
        "rounding": rounding(payload["rounding"]),
        "recomputed": recomputed(payload["recomputed"]),
    }
