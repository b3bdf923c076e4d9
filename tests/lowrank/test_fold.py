"""Folds against float64, whatever part of W is here; residuals to the bit; and the drift of thousands of folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import megalowrank.lowrank.fold as fold_module
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.lowrank.factors import LowRankFactors
from megalowrank.lowrank.fold import RESIDUAL_DTYPES, FoldedWeight, WeightPiece, join_residual, split_residual
from megalowrank.methods.base import Context
from megalowrank.methods.switchlora import SwitchLoRA, SwitchLoRAConfig
from tests.methods.ring import start_factors

# ---------------------------------------------------------------- residuals


def bit_patterns() -> torch.Tensor:
    """float32 values: random bits without NaN, all exponents, zeros, the largest, ties and subnormal numbers."""
    source = np.random.default_rng(0)
    random = source.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    exponents = np.arange(255, dtype=np.uint32) << 23
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7FFFFF, 0x7F8000, 0x7F7FFF], dtype=np.uint32)
    extreme = (exponents[:, None] + low[None]).reshape(-1)
    bits = np.concatenate((random, extreme, extreme | np.uint32(1 << 31)))
    values = torch.from_numpy(bits.view(np.float32).copy())
    return values[torch.isfinite(values)]


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32).to(torch.int64)


def test_int16_residual_is_exact() -> None:
    """Also with the sign of zero."""
    values = bit_patterns()
    high, low = split_residual(values, torch.int16)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(bits_of(join_residual(high, low)), bits_of(values))


def test_high_part_is_the_nearest_bfloat16() -> None:
    """As torch rounds, but for ties, which go to the larger magnitude here and to even there."""
    values = bit_patterns()
    tie = (bits_of(values) & 0xFFFF) == 0x8000
    high, low = split_residual(values, torch.int16)
    nearest = values.to(torch.bfloat16)
    assert torch.equal(high[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
    assert tie.sum() > 400 and (low[tie] == -0x8000).all()


def test_int8_residual_is_within_half_of_its_unit() -> None:
    """The unit is 256 of float32's last places; the largest rest has no number above it and is off by one unit."""
    values = bit_patterns()
    off = (bits_of(join_residual(*split_residual(values, torch.int8))) - bits_of(values)).abs()
    rest = (bits_of(values) + 0x8000) % 0x10000 - 0x8000
    inside = rest < 0x7F80
    assert (off[inside] <= 0x80).all() and (off <= 0xFF).all() and (~inside).sum() > 100


# ---------------------------------------------------------------- folds

OUT, IN, BLOCKS = 23, 17, ((0, 9), (9, 1), (10, 13))
TOLERANCE = {"fp64": 1e-13, "fp32": 1e-5, "none": 2.0**-7, "int8": 2.0**-14, "int16": 1e-5}


def weight(kind: str) -> FoldedWeight:
    """W with its residual as ``build`` makes it, in the precision of an engine."""
    value = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(value if kind == "fp64" else value.float(), requires_grad=False)
    folded = FoldedWeight(parameter)
    folded.keep_residual(RESIDUAL_DTYPES.get(kind))
    if kind in RESIDUAL_DTYPES:
        parameter.data = parameter.data.to(torch.bfloat16)
    return folded


def changes(dtype: torch.dtype) -> list[tuple[int, torch.Tensor, torch.Tensor, float]]:
    """(first row, u [k, rows], v [k, in], scale) of folds into every row block."""
    source, found = torch.Generator().manual_seed(1), []
    for count in (1, 3, 8):
        for start, rows in BLOCKS:
            u = torch.randn(count, rows, dtype=torch.float64, generator=source)
            v = torch.randn(count, IN, dtype=torch.float64, generator=source)
            found.append((start, u.to(dtype), v.to(dtype), 0.3 - 0.1 * count))
    return found


def expected(folded: FoldedWeight, dtype: torch.dtype) -> torch.Tensor:
    value = folded.value().double().view(OUT, IN).clone()
    for start, u, v, scale in changes(dtype):
        value[start : start + u.shape[1]] += scale * u.double().t() @ v.double()
    return value


def pieces_of(kind: str, cuts: list[int]) -> list[tuple[FoldedWeight, torch.Tensor, torch.Tensor]]:
    """W cut at these elements: what each rank holds of it, its flat tensor and a mirror of the middle of that."""
    found = []
    for begin, end in zip([0, *cuts], [*cuts, OUT * IN], strict=True):
        folded = weight(kind)
        flat = folded.parameter.data.view(-1)[begin:end].clone()
        offset = (end - begin) // 3
        mirror = flat[offset : offset + (end - begin) // 3].clone()
        piece = WeightPiece(flat, begin, (mirror, offset))
        folded.bind(lambda piece=piece: piece)  # type: ignore[misc]
        found.append((folded, flat, mirror))
    return found


@pytest.mark.parametrize("kind", list(TOLERANCE))
def test_whole_weight(kind: str) -> None:
    folded = weight(kind)
    dtype = torch.float64 if kind == "fp64" else torch.float32
    reference, start = expected(folded, dtype), folded.value().double().clone()
    for change in changes(dtype):
        folded.add(*change)
    found = folded.value().double().view(OUT, IN)
    scale = float(reference.abs().max())
    torch.testing.assert_close(found, reference, rtol=0, atol=TOLERANCE[kind] * scale)
    assert (found.view(-1) - start).abs().mean() > 0.1


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_ragged_pieces(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts anywhere, in steps of any size; the mirror follows and nothing outside the piece is touched."""
    monkeypatch.setattr(fold_module, "_CHUNK_ELEMENTS", chunk)
    dtype, source = torch.float64 if kind == "fp64" else torch.float32, np.random.default_rng(2)
    reference = expected(weight(kind), dtype)
    for count in (1, 2, 3, 7):
        cuts = sorted(source.choice(np.arange(1, OUT * IN), count, replace=False).tolist())
        pieces = pieces_of(kind, cuts)
        for folded, _, _ in pieces:
            for change in changes(dtype):
                folded.add(*change)
        found = torch.cat([folded.value() for folded, _, _ in pieces]).double().view(OUT, IN)
        torch.testing.assert_close(found, reference, rtol=0, atol=TOLERANCE[kind] * float(reference.abs().max()))
        for folded, flat, mirror in pieces:
            offset = flat.numel() // 3
            assert torch.equal(mirror, flat[offset : offset + mirror.numel()])
            assert folded.residual is None or folded.residual.numel() == flat.numel()


@pytest.mark.parametrize("kind", list(TOLERANCE))
def test_rows_outside_the_block_keep_their_bits(kind: str) -> None:
    dtype = torch.float64 if kind == "fp64" else torch.float32
    for folded in (weight(kind), *(folded for folded, _, _ in pieces_of(kind, [100, 101, 230]))):
        before, start = folded.value().clone(), folded.locate().start
        folded.add(9, torch.ones(1, 1, dtype=dtype), torch.ones(1, IN, dtype=dtype), 1.0)
        changed = (folded.value() != before).nonzero().flatten() + start
        assert ((changed >= 9 * IN) & (changed < 10 * IN)).all()


def test_the_forward_pass_reads_the_rounded_weight() -> None:
    folded = weight("int16")
    assert torch.equal(folded.parameter.data.view(-1).view(torch.int16), split_residual(folded.value(), torch.int16)[0]
                       .view(torch.int16))  # fmt: skip
    assert not torch.equal(folded.parameter.data.float().view(-1), folded.value())


def test_vectors_on_another_device_than_w_go_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """W in host memory (offload_param), vectors on the accelerator; the meta device stands for it."""
    by_pieces: list[torch.device] = []
    monkeypatch.setattr(FoldedWeight, "_add_piece", lambda self, piece, row, u, v, s: by_pieces.append(u.device))
    weight = FoldedWeight(torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False))
    for device in ("cpu", "meta"):
        weight.add(0, torch.ones(2, 6, device=device), torch.ones(2, 4, device=device), 0.5)
    assert by_pieces == [torch.device("meta")] and float(weight.value().min()) == 1.0


# ---------------------------------------------------------------- drift

SIZE, RANK, INTERVAL, DRIFT_STEPS = 256, 64, 10, 400


def drift(residual: str) -> tuple[float, int]:
    """Relative change of W + sBA after 400 steps of switching 6.4 vectors of A and of B, with lr 0, in bfloat16."""
    parameter = torch.nn.Parameter(torch.empty(SIZE, SIZE), requires_grad=False)
    torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    A, Bt = (torch.nn.Parameter(torch.zeros(RANK, SIZE)) for _ in range(2))
    layer = LowRankFactors("layer", A, Bt, FoldedWeight(parameter), 0, 1 / RANK)
    layer.index = 0
    method = SwitchLoRA(SwitchLoRAConfig(switch_interval=INTERVAL, switch_schedule="constant", lora_rank=RANK))
    start_factors(method, [layer], 0, torch.bfloat16)
    layer.weight.keep_residual(RESIDUAL_DTYPES[residual])
    module = torch.nn.Module()
    for name, p in (("W", parameter), ("A", A), ("B", Bt)):
        module.register_parameter(name, p)
    module.bfloat16()
    engine = DenseEngine(module, [layer], VectorClockAdamW([A, Bt]), 0.0)
    ctx = Context([layer], engine.state, 0, DRIFT_STEPS, 0, 1, lambda numel, dtype: torch.empty(numel, dtype=dtype))
    method.start(ctx)
    start = function(layer)
    for step in range(DRIFT_STEPS):
        method.before_step(step, ctx)
    return float((function(layer) - start).norm() / start.norm()), int(method.switched[0])


def function(layer: LowRankFactors) -> torch.Tensor:
    """W + sBA in float64, of the values that the forward pass sees and W's residual."""
    factors = layer.Bt.detach().double().t() @ layer.A.detach().double()
    return layer.weight.value().double().view(SIZE, SIZE) + layer.scale * factors


def test_drift(capsys: pytest.CaptureFixture[str]) -> None:
    """The default keeps the function; without a residual it is lost, so this test can fail."""
    found = {residual: drift(residual) for residual in RESIDUAL_DTYPES}
    with capsys.disabled():
        numbers = ", ".join(f"{residual} {100 * value:.4f} %" for residual, (value, _) in found.items())
        print(f"\ndrift of W + sBA after {DRIFT_STEPS} steps in bfloat16: {numbers}")
    assert all(switched > 6 * DRIFT_STEPS for _, switched in found.values())
    assert found["int16"][0] <= 1e-3
    assert found["none"][0] > 0.05 and found["int16"][0] < found["int8"][0] < found["none"][0]
