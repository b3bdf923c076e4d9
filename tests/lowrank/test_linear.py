"""The low-rank linear against plain autograd in float64, as a function and inside both parallel linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.lowrank.factors import LowRankSpec
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankFunction, LowRankRowParallelLinear
from megalowrank.models.transformer import transformer_config
from megalowrank.parallel.groups import initialize_single_process

GROUPS = {"single": [(6, 3)], "gate and up": [(5, 2), (5, 2)], "grouped query": [(6, 4), (2, 1), (3, 5)]}
"""(rows of W, rank) of every logical matrix."""
IN, SCALE = 7, 0.37
LEADS = [(4,), (3, 2), (2, 1, 3)]


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


def function(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, A: Any, Bt: Any) -> torch.Tensor:
    return LowRankFunction.apply(x, W, bias, SCALE, *A, *Bt)


def leaves(given: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in (given["x"], given["bias"], *given["A"], *given["Bt"]) if t is not None and t.requires_grad]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward(groups: list[tuple[int, int]], lead: tuple[int, ...], bias: bool) -> None:
    given = inputs(groups, lead, bias)
    found, expected = function(**given), plain(**given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = torch.autograd.grad((found * weights).sum(), leaves(given))
    other = torch.autograd.grad((expected * weights).sum(), leaves(given))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert float(mine.abs().max()) > 0.01


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_finite_differences(groups: list[tuple[int, int]]) -> None:
    given = inputs(groups, (3,), True)
    count = len(groups)

    def call(x: torch.Tensor, bias: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return function(x, given["W"], bias, factors[:count], factors[count:])

    assert torch.autograd.gradcheck(call, leaves(given))


def test_input_and_bias_that_need_no_gradient() -> None:
    """The first layer of a model, and a frozen bias."""
    given = inputs(GROUPS["grouped query"], (4,), True)
    given["x"], given["bias"] = given["x"].detach(), given["bias"].detach()
    own = torch.autograd.grad(function(**given).square().sum(), leaves(given))
    other = torch.autograd.grad(plain(**given).square().sum(), leaves(given))
    assert len(own) == 6
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_gradient_that_is_not_contiguous() -> None:
    given = inputs(GROUPS["grouped query"], (4, 3), False)
    weights = torch.randn(11, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).permute(2, 1, 0)
    own = torch.autograd.grad(function(**given), leaves(given), weights)
    other = torch.autograd.grad(plain(**given), leaves(given), weights)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_only_the_input_and_the_narrow_product_are_kept() -> None:
    """Beside x, W and the factors nothing wider than the sum of the ranks is saved for the backward pass."""
    given = inputs(GROUPS["gate and up"], (50,), False)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**given)
    known = {t.data_ptr() for t in (given["x"], given["W"], *given["A"], *given["Bt"])}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(50, 4)]


# ---------------------------------------------------------------- inside megatron-core's linears


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    initialize_single_process(str(tmp_path_factory.mktemp("store") / "store"))
    yield


def linear(kind: type, blocks: Any, spec: LowRankSpec | None, bias: bool = False, **more: Any) -> Any:
    config = transformer_config(ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2,
                                            num_query_groups=1, vocab_size=8), torch.float64)  # fmt: skip
    rows = sum(out for _, out in blocks)
    module = kind(IN, rows, config=config, init_method=torch.nn.init.zeros_, bias=bias, blocks=blocks, lowrank=spec,
                  **more)  # fmt: skip
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
def test_parallel_linears(one_process: None, kind: str, bias: bool, late: bool) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
def test_without_factors_it_is_a_trained_linear(one_process: None, kind: str) -> None:
    cls, flags = KINDS[kind]
    module, x = linear(cls, (("o", 6),), None, **flags), leaf(4, IN, seed=99)
    y, _ = module(x)
    torch.testing.assert_close(y, x @ module.weight.t(), rtol=0, atol=1e-12)
    y.sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["weight"] and not module.factors


def test_factors_know_their_rows_of_the_fused_weight(one_process: None) -> None:
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
