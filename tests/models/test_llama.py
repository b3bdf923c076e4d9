"""Our LLaMA against transformers', its initial weights, which matrices are adapted, and recomputation."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods import method_class
from megalowrank.models import build as build_module
from megalowrank.models.build import BuiltModel, build_llama
from megalowrank.parallel.groups import initialize_single_process
from megalowrank.parallel.rng import generator
from tests.models.hugging_face import effective_weights, hugging_face

# every size differs from every other, and so do base and epsilon from their defaults
GQA = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=52, num_attention_heads=6, num_query_groups=2, vocab_size=70,
    rotary_base=500.0, norm_epsilon=1e-3, init_method_std=0.15,
)  # fmt: skip
MHA = replace(GQA, num_query_groups=6)
TIED = replace(GQA, tie_word_embeddings=True)
PLAIN = replace(GQA, init_method_std=0.02)
LENGTH = 21
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"lora_rank": 5, "lora_alpha": 3.0}),
    "lora in the mlp": ("lora", {"lora_rank": 16, "lora_target": ["gate", "up", "down"]}),
    "switchlora": ("switchlora", {"lora_rank": 4}),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def build(case: str, config: ModelConfig = GQA, seed: int = 1, **options: Any) -> BuiltModel:
    name, flags = METHODS[case]
    kind = method_class(name)
    return build_llama(config, kind(kind.config_class(**flags)), length=LENGTH, seed=seed, **options)


def build_with(method: str, config: ModelConfig = PLAIN, seed: int = 1, **flags: Any) -> BuiltModel:
    kind = method_class(method)
    return build_llama(config, kind(kind.config_class(**flags)), length=LENGTH, seed=seed)


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 70, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def disturb(model: BuiltModel) -> None:
    """Norms that differ from ones, and factors that do not cancel against W."""
    source = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in model.tensors:
            if not tensor.name.endswith(".weight") or len(tensor.shape) == 1:
                tensor.parameter.add_(torch.randn(tensor.shape, generator=source), alpha=0.2)


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
@pytest.mark.parametrize("config", [MHA, GQA, TIED], ids=["mha", "gqa", "tied"])
@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers(
    case: str, config: ModelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(case, config, dtype=dtype)
    disturb(model)
    batch = tokens()
    expected = hugging_face(config, model, dtype)(batch[:, :-1]).logits
    logits = model.module.logits(batch[:, :-1]).transpose(0, 1)
    assert logits.dtype == dtype and logits.shape == expected.shape == (3, LENGTH, 70)
    assert expected.std() > 0.5, "there must be something to compare"
    assert (logits - expected).abs().max() <= tolerance
    loss = F.cross_entropy(expected.flatten(0, 1), batch[:, 1:].flatten())
    assert float(model.module(batch)) == pytest.approx(float(loss), abs=tolerance / 10)


@torch.no_grad()
def test_a_token_does_not_see_those_after_it() -> None:
    model = build("switchlora")
    batch, changed = tokens()[:, :-1], tokens()[:, :-1]
    changed[:, 12:] = (changed[:, 12:] + 1) % 70
    before, after = model.module.logits(batch), model.module.logits(changed)
    assert (before[:12] - after[:12]).abs().max() < 1e-5
    assert (before[12:] - after[12:]).abs().max() > 0.1


@torch.no_grad()
def test_a_shorter_sequence_is_a_prefix() -> None:
    model = build("lora")
    batch = tokens()[:, :-1]
    assert torch.allclose(model.module.logits(batch[:, :7]), model.module.logits(batch)[:7], atol=1e-5)


# ---------------------------------------------------------------- initial weights


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lora", {"lora_rank": 1}),
        ("lora", {"lora_rank": 16}),
        ("lora", {"lora_rank": 4, "lora_alpha": 16.0}),
        ("lora", {"lora_rank": 4, "lora_init": "classic"}),
        ("lora", {"lora_rank": 4, "lora_target": ["o", "down"]}),
        ("switchlora", {"lora_rank": 4}),
        ("switchlora", {"lora_rank": 16, "switch_order": "random"}),
    ],
)
def test_every_method_starts_at_the_same_function(method: str, flags: dict[str, Any]) -> None:
    plain, other = effective_weights(build("full", PLAIN)), effective_weights(build_with(method, **flags))
    assert list(plain) == list(other)
    for name, weight in plain.items():
        assert (weight - other[name]).abs().max() <= 1e-6, name


def test_factors_are_not_zero_and_w_makes_room_for_them() -> None:
    plain, model = effective_weights(build("full", PLAIN)), build_with("switchlora", lora_rank=4)
    for layer in model.layers:
        assert float(layer.A.abs().max()) > 0.01 and float(layer.Bt.abs().max()) > 0.01
        stored = layer.weight.parameter[layer.row_start : layer.row_start + layer.out_features]
        assert (stored - plain[f"{layer.name}.weight"]).abs().max() > 1e-3


def test_weights_depend_on_seed_and_name_alone() -> None:
    """Drawn here by name; neither the number of blocks nor that of other matrices matters."""
    found = effective_weights(build("full", PLAIN, seed=5))
    for name, weight in found.items():
        if weight.dim() == 1:
            assert bool((weight == 1).all())
            continue
        drawn = torch.empty(weight.numel()).normal_(0.0, 0.02, generator=generator(5, name))
        assert torch.equal(weight, drawn.view(weight.shape).double()), name
    deeper = effective_weights(build("full", replace(PLAIN, num_layers=5, ffn_hidden_size=60), seed=5))
    same = [name for name, weight in found.items() if torch.equal(weight, deeper[name])]
    assert [name for name in found if name not in same] == [name for name in found if ".mlp." in name]


def test_other_seeds_and_names_give_other_weights() -> None:
    first, second = (effective_weights(build("full", PLAIN, seed=seed)) for seed in (5, 6))
    matrices = [name for name, weight in first.items() if weight.dim() == 2]
    assert all((first[name] != second[name]).float().mean() > 0.99 for name in matrices)
    firsts = {float(first[name].view(-1)[0]) for name in matrices}
    assert len(firsts) == len(matrices) == 3 * 7 + 2


def test_factors_depend_on_seed_and_name_alone() -> None:
    short, long = (build_with("lora", replace(PLAIN, num_layers=n), lora_rank=4) for n in (1, 3))
    others = build_with("switchlora", lora_rank=4)
    for layer, same, switched in zip(short.layers, long.layers, others.layers, strict=False):
        assert layer.name == same.name == switched.name
        assert torch.equal(layer.A, same.A) and torch.equal(layer.Bt, switched.Bt)
    assert not torch.equal(long.layers[0].A, long.layers[7].A)


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_spread_of_the_initial_weights(std: float) -> None:
    config = replace(PLAIN, hidden_size=192, ffn_hidden_size=256, vocab_size=400, init_method_std=std)
    for name, weight in effective_weights(build("full", config)).items():
        if weight.dim() == 2:
            assert float(weight.std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5, name


# ---------------------------------------------------------------- which matrices are adapted


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (["gate", "up", "down"], {f"{n}.mlp.{part}" for n in range(3) for part in ("gate", "up", "down")}),
        (["q", "k", "v"], {f"{n}.attention.{part}" for n in range(3) for part in "qkv"}),
        (["o"], {f"{n}.attention.o" for n in range(3)}),
        (["layers.1.*"], {f"1.{part}" for part in ("attention.q", "attention.k", "attention.v", "attention.o",
                                                   "mlp.gate", "mlp.up", "mlp.down")}),
        (["layers.[02].mlp.down", "o"], {"0.mlp.down", "2.mlp.down", *(f"{n}.attention.o" for n in range(3))}),
    ],
)  # fmt: skip
def test_targets(target: list[str], names: set[str]) -> None:
    model = build_with("lora", lora_rank=4, lora_target=target)
    assert {layer.name.removeprefix("layers.") for layer in model.layers} == names
    assert [layer.index for layer in model.layers] == list(range(len(names)))
    for tensor in model.tensors:
        logical = tensor.name.removeprefix("layers.").rsplit(".", 1)[0]
        frozen = tensor.name.endswith(".weight") and logical in names
        assert tensor.parameter.requires_grad is not frozen, tensor.name


@pytest.mark.parametrize("target", [["q"], ["gate"], ["o", "k", "v"], ["layers.2.attention.v"], ["up", "down"]])
def test_a_fused_projection_is_not_split(target: list[str]) -> None:
    with pytest.raises(ConfigError, match="--lora-target splits the fused projection") as caught:
        build_with("lora", lora_rank=4, lora_target=target)
    assert ("q/k/v" in str(caught.value)) is ("attention.qkv" in str(caught.value))


@pytest.mark.parametrize("pattern", ["query", "layers.3.*", "Q", "embedding", ""])
def test_a_pattern_that_matches_nothing_lists_the_names(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_with("switchlora", lora_rank=4, lora_target=["o", pattern])
    expected = f"--lora-target matches no layer; got {pattern!r}; allowed: q, k, v, o, gate, up, down"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("rank", "target", "name"),
    [
        (17, ["q", "k", "v", "o"], "layers.0.attention.k [16, 48]"),
        (49, ["gate", "up"], "layers.0.mlp.gate [52, 48]"),
        (49, ["layers.2.mlp.down"], "layers.2.mlp.down [48, 52]"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "switchlora"])
def test_a_rank_above_the_smallest_matrix_is_refused_before_anything_is_built(
    method: str, rank: int, target: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was built")

    assert build_with(method, lora_rank=rank - 1, lora_target=target).layers
    monkeypatch.setattr(build_module, "Transformer", refuse)
    with pytest.raises(ConfigError) as caught:
        build_with(method, lora_rank=rank, lora_target=target)
    assert str(caught.value).startswith(f"--lora-rank is larger than the matrix {name}; got {rank}")


# ---------------------------------------------------------------- recomputation


@pytest.mark.parametrize("case", METHODS)
def test_recomputation_changes_nothing_but_the_work(case: str) -> None:
    found = []
    for recompute in (False, True):
        model = build(case, recompute=recompute)
        disturb(model)
        calls: list[int] = []
        for number, block in enumerate(model.module.layers):
            block.mlp.linear_fc1.register_forward_hook(lambda *args, n=number, to=calls: to.append(n))
        loss = model.module(tokens())
        loss.backward()
        assert calls == ([0, 1, 2, 2, 1, 0] if recompute else [0, 1, 2])
        found.append((loss.detach(), {name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (loss, gradients) = found
    assert torch.equal(loss, plain_loss) and plain.keys() == gradients.keys()
    for name, gradient in plain.items():
        assert float(gradient.abs().max()) > 0 and torch.equal(gradients[name], gradient), name
