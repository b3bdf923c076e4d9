"""The low-rank linears on one rank against plain autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.fold import Tap
from megalowrank.lowrank.functions import LowRankColumnFunction, LowRankRowFunction
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.lowrank.pairs import Pairs
from megalowrank.parallel.partition import share
from megalowrank.parallel.wire import Wire, partial_parameters
from tests.lowrank.linear_cases import core_config

FUNCTIONS = {"column": LowRankColumnFunction, "row": LowRankRowFunction}
GROUPS = {"single": [(6, 3)], "gate and up": [(5, 2), (5, 2)], "grouped query": [(6, 4), (2, 1), (3, 5)]}
"""(rows of W, rank) of every logical matrix."""
IN, SCALE = 7, 0.37
LEADS = [(4,), (3, 2), (2, 1, 3)]
ALONE = [Wire(), Wire(sequence=True, ride=False)]


def leaf(*shape: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=source).requires_grad_()


def inputs(groups: list[tuple[int, int]], lead: tuple[int, ...], bias: bool) -> dict[str, Any]:
    rows = sum(out for out, _ in groups)
    return {
        "x": leaf(*lead, IN, seed=0),
        "W": leaf(rows, IN, seed=1).detach(),
        "bias": leaf(rows, seed=2) if bias else None,
        "A": [leaf(rank, IN, seed=10 + g) for g, (_, rank) in enumerate(groups)],
        "Bt": [leaf(rank, out, seed=20 + g) for g, (out, rank) in enumerate(groups)],
    }


def plain(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, A: Any, Bt: Any) -> torch.Tensor:
    """y = x (W + s · B A)ᵀ + bias, with W + s·B·A made as one matrix."""
    whole = W + SCALE * torch.cat([b.t() @ a for a, b in zip(A, Bt, strict=True)])
    y = x @ whole.t()
    return y if bias is None else y + bias


def function(kind: str, x: Any, W: Any, bias: Any, A: Any, Bt: Any, wire: Wire = ALONE[0]) -> torch.Tensor:
    return FUNCTIONS[kind].apply(x, W, bias, pairs_of(A, Bt), wire, None, None, *A, *Bt)


def pairs_of(A: Any, Bt: Any, scales: tuple[float, ...] | None = None) -> Pairs:
    """Consecutive row blocks, all of them with the one scale unless ``scales`` are given."""
    starts = [sum(b.shape[1] for b in Bt[:g]) for g in range(len(Bt))]
    return Pairs(tuple(starts), scales or (SCALE,) * len(A))


def leaves(given: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in (given["x"], given["bias"], *given["A"], *given["Bt"]) if t is not None and t.requires_grad]


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward(kind: str, groups: list[tuple[int, int]], lead: tuple[int, ...], bias: bool) -> None:
    given = inputs(groups, lead, bias)
    found, expected = function(kind, **given), plain(**given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = torch.autograd.grad((found * weights).sum(), leaves(given))
    other = torch.autograd.grad((expected * weights).sum(), leaves(given))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert float(mine.abs().max()) > 0.01


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("fixed", [("A",), ("B",), ("A0", "B1"), ("A", "B")], ids=str)
def test_fixed_factors_get_no_gradient_and_change_no_other(kind: str, fixed: tuple[str, ...]) -> None:
    """Whichever factors are trained; with grouped projections the sides may differ from matrix to matrix."""
    given = inputs(GROUPS["grouped query"], (4,), False)
    for side, name in (("A", "A"), ("B", "Bt")):
        for g, factor in enumerate(given[name]):
            if side in fixed or f"{side}{g}" in fixed:
                factor.requires_grad_(False)
    weights = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = torch.autograd.grad((function(kind, **given) * weights).sum(), leaves(given))
    other = torch.autograd.grad((plain(**given) * weights).sum(), leaves(given))
    assert len(own) == 7 - sum(len(GROUPS["grouped query"]) if len(name) == 1 else 1 for name in fixed)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("scales", [(0.5, 0.25, 2.0), (0.5, 0.0, 2.0), (0.0, 0.0, 0.0)], ids=str)
def test_every_pair_has_its_scale_and_0_turns_it_off(kind: str, scales: tuple[float, ...]) -> None:
    """Its factors then get gradient 0, and no product sees them: they may be NaN."""
    given = inputs(GROUPS["grouped query"], (4,), True)
    A, Bt, on = given["A"], given["Bt"], [bool(s) for s in scales]
    weights = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    terms = [s * b.t() @ a for s, a, b in zip(scales, A, Bt, strict=True)]
    expected = given["x"] @ (given["W"] + torch.cat(terms)).t() + given["bias"]
    other = torch.autograd.grad((expected * weights).sum(), leaves(given))
    for a, keep in zip(A, on, strict=True):
        a.data.mul_(1.0 if keep else torch.nan)
    found = FUNCTIONS[kind].apply(
        given["x"], given["W"], given["bias"], pairs_of(A, Bt, scales), ALONE[0], None, None, *A, *Bt
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    own = torch.autograd.grad((found * weights).sum(), leaves(given))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_a_tap_gives_the_gradient_of_the_frozen_weight(kind: str, lead: tuple[int, ...]) -> None:
    """And nothing but its anchor needs to be asked for; every other gradient is as without it."""
    given = inputs(GROUPS["gate and up"], lead, True)
    found: list[torch.Tensor] = []
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = FUNCTIONS[kind].apply(
        given["x"], given["W"], given["bias"], pairs_of(given["A"], given["Bt"]), ALONE[0],
        Tap(anchor, found.append), anchor, *given["A"], *given["Bt"],
    )  # fmt: skip
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.autograd.grad((y * weights).sum(), [anchor], retain_graph=True)
    trained = given["W"].clone().requires_grad_()
    (expected,) = torch.autograd.grad((plain(**{**given, "W": trained}) * weights).sum(), [trained])
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    own = torch.autograd.grad((y * weights).sum(), leaves(given))
    other = torch.autograd.grad((plain(**given) * weights).sum(), leaves(given))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def composed(x: Any, W: Any, bias: Any, A: Any, Bt: Any, dy: Any) -> list[torch.Tensor]:
    """The products of one rank in the order that golden runs and comparisons of engines rely on."""
    u = (x @ torch.cat(A).t()) * SCALE
    spans = [b.shape for b in Bt]
    us, dys = u.split([rank for rank, _ in spans], 1), dy.split([out for _, out in spans], 1)
    ys = F.linear(x, W, bias).split([out for _, out in spans], 1)
    y = torch.cat([torch.addmm(part, own, b) for part, own, b in zip(ys, us, Bt, strict=True)], 1)
    du = torch.cat([part @ b.t() for part, b in zip(dys, Bt, strict=True)], 1) * SCALE
    dx = torch.addmm(dy @ W, du, torch.cat(A))
    grad_A = (du.t() @ x).split([a.shape[0] for a in A])
    return [y, dx, dy.sum(0), *grad_A, *(own.t() @ part for own, part in zip(us, dys, strict=True))]


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wire", ALONE, ids=["default", "sequence"])
def test_one_rank_computes_as_ever(kind: str, dtype: torch.dtype, wire: Wire) -> None:
    """Bit by bit, whatever the wire says: no process group is needed and nothing is reordered."""
    given = inputs(GROUPS["grouped query"], (40,), True)
    cast = {name: [t.detach().to(dtype).requires_grad_() for t in given[name]] for name in ("A", "Bt")}
    cast |= {name: given[name].detach().to(dtype).requires_grad_(name != "W") for name in ("x", "W", "bias")}
    dy = leaf(40, 11, seed=5).detach().to(dtype)
    y = function(kind, **cast, wire=wire)
    own = [y, *torch.autograd.grad(y, leaves(cast), dy)]
    with torch.no_grad():
        reference = composed(**cast, dy=dy)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own, reference, strict=True))


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_finite_differences(kind: str, groups: list[tuple[int, int]]) -> None:
    given = inputs(groups, (3,), True)
    count = len(groups)

    def call(x: torch.Tensor, bias: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return function(kind, x, given["W"], bias, factors[:count], factors[count:])

    assert torch.autograd.gradcheck(call, leaves(given))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_input_and_bias_that_need_no_gradient(kind: str) -> None:
    """The first layer of a model, and a frozen bias."""
    given = inputs(GROUPS["grouped query"], (4,), True)
    given["x"], given["bias"] = given["x"].detach(), given["bias"].detach()
    own = torch.autograd.grad(function(kind, **given).square().sum(), leaves(given))
    other = torch.autograd.grad(plain(**given).square().sum(), leaves(given))
    assert len(own) == 6
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_gradient_that_is_not_contiguous(kind: str) -> None:
    given = inputs(GROUPS["grouped query"], (4, 3), False)
    weights = torch.randn(11, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).permute(2, 1, 0)
    own = torch.autograd.grad(function(kind, **given), leaves(given), weights)
    other = torch.autograd.grad(plain(**given), leaves(given), weights)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_only_the_input_and_the_narrow_product_are_kept(kind: str) -> None:
    """Beside x, W and the factors nothing wider than the sum of the ranks is saved for the backward pass."""
    given = inputs(GROUPS["gate and up"], (50,), False)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(kind, **given)
    known = {t.data_ptr() for t in (given["x"], given["W"], *given["A"], *given["Bt"])}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(50, 4)]


# ---------------------------------------------------------------- inside megatron-core's linears


def linear(kind: type, blocks: Any, spec: LowRankSpec | None, bias: bool = False, **more: Any) -> Any:
    """A module on one rank with drawn parameters."""
    wire, rows = Wire(), sum(out for _, out in blocks)
    module = kind(IN, rows, config=core_config(wire, torch.float64), init_method=None, bias=bias, blocks=blocks,
                  columns=IN, lowrank=spec, wire=wire, **more)  # fmt: skip
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(leaf(*parameter.shape, seed=number).detach())
    return module


ROW = {"input_is_parallel": True, "skip_bias_add": False}
KINDS = {
    "column": (LowRankColumnParallelLinear, {"gather_output": False, "skip_bias_add": False}),
    "row": (LowRankRowParallelLinear, ROW),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_parallel_linears(kind: str, bias: bool, late: bool) -> None:
    """One and three matrices; a late bias is handed to the caller instead of added."""
    cls, flags = KINDS[kind]
    for blocks in ((("o", 6),), (("q", 6), ("k", 2), ("v", 3))):
        module = linear(cls, blocks, LowRankSpec(2, SCALE), bias, **{**flags, "skip_bias_add": late})
        x = leaf(5, 2, IN, seed=99)
        A, Bt = ([getattr(module, f"{side}_{name}") for name, _ in blocks] for side in "AB")
        added = None if late else module.bias
        expected = plain(x, module.weight.detach(), added, A, Bt)
        y, handed = module(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        assert (handed is not None) == (late and bias)
        own = torch.autograd.grad(y.square().sum(), [x, *A, *Bt])
        other = torch.autograd.grad(expected.square().sum(), [x, *A, *Bt])
        for mine, theirs in zip(own, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-11)
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        assert trained == [n for n, _ in module.named_parameters() if n != "weight"]
        assert not partial_parameters(module)


@pytest.mark.parametrize("kind", KINDS)
def test_without_factors_it_is_a_trained_linear(kind: str) -> None:
    cls, flags = KINDS[kind]
    module, x = linear(cls, (("o", 6),), None, **flags), leaf(4, IN, seed=99)
    y, _ = module(x)
    assert torch.equal(y, F.linear(x, module.weight))
    y.sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["weight"] and not module.factors


def test_factors_know_their_rows_of_the_fused_weight() -> None:
    """A fold of one logical matrix changes its rows alone, by s · uᵀ v; gates mask the gradient of frozen rows."""
    cls, flags = KINDS["column"]
    module = linear(cls, (("q", 6), ("k", 2), ("v", 3)), LowRankSpec(2, SCALE), **flags)
    before, (q, k, v) = module.weight.detach().clone(), module.factors
    assert [(f.name, f.row_start, f.out_features, f.in_features, f.rank) for f in (q, k, v)] == [
        ("q", 0, 6, 7, 2), ("k", 6, 2, 7, 2), ("v", 8, 3, 7, 2),
    ]  # fmt: skip
    u, w = leaf(3, 2, seed=1).detach(), leaf(3, 7, seed=2).detach()
    k.fold(u, w)
    expected = before.clone()
    expected[6:8] += SCALE * u.t() @ w
    torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=1e-12)
    v.gate_A.frozen, q.gate_Bt.frozen = [(1, 2)], [(0, 1), (1, 2)]
    module(leaf(4, IN, seed=99))[0].square().sum().backward()
    assert (v.A.grad[1] == 0).all() and (v.A.grad[0] != 0).all()
    assert (q.Bt.grad == 0).all() and (v.Bt.grad != 0).all() and module.weight.grad is None


def test_a_weight_that_is_assigned_later() -> None:
    """A tied head: no weight of its own, the gradient goes to the embedding's."""
    cls, flags = KINDS["column"]
    head = linear(cls, (("output", 6),), None, skip_weight_param_allocation=True, **flags)
    assert head.weight is None and not list(head.parameters())
    assert head.blocks == (("output", share(6)),) and head.columns == share(IN)
    head.weight, x = torch.nn.Parameter(leaf(6, IN, seed=1).detach()), leaf(4, IN, seed=99)
    y, _ = head(x)
    y.sum().backward()
    torch.testing.assert_close(head.weight.grad, x.detach().sum(0).expand(6, IN), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "more", "word"),
    [
        ("column", {"gather_output": True}, "gather_output"),
        ("column", {"skip_weight_param_allocation": True}, "weight"),
        ("row", {"input_is_parallel": False}, "input_is_parallel"),
    ],
)
def test_what_megatron_core_has_and_these_have_not(kind: str, more: dict[str, bool], word: str) -> None:
    cls, flags = KINDS[kind]
    with pytest.raises(ValueError, match=word):
        linear(cls, (("o", 6),), LowRankSpec(2, SCALE), **{**flags, **more})


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_without_room_for_padding_are_refused(kind: str) -> None:
    cls, flags = KINDS[kind]
    config = core_config(Wire(), torch.float64)
    with pytest.raises(ValueError, match=r"\[6, 7\].*\[6, 8\]"):
        cls(7, 6, config=config, init_method=None, bias=False, blocks=(("o", 6),), columns=8, lowrank=None,
            wire=Wire(), **flags)  # fmt: skip
