"""Our GPT-2, GPT-NeoX and OPT against transformers': logits, gradients, initial weights, tied heads, recomputation."""

from __future__ import annotations

import math
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
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.parallel.groups import initialize_single_process
from megalowrank.parallel.rng import generator
from tests.models.hugging_face import effective_weights, hugging_face, logical, theirs

LENGTH, WORDS = 21, 70
SHAPE = ModelConfig(num_layers=3, hidden_size=48, num_attention_heads=3, vocab_size=WORDS, init_method_std=0.15)
# head 16, of which 4 are rotated by default; every size differs from every other
CONFIGS = {
    "llama": replace(SHAPE, model_family="llama", num_attention_heads=6, num_query_groups=2, ffn_hidden_size=52),
    "gpt2": replace(SHAPE, model_family="gpt2", max_position_embeddings=29),
    "gpt2, other sizes": replace(SHAPE, model_family="gpt2", ffn_hidden_size=52, norm_epsilon=1e-3),
    "neox": replace(SHAPE, model_family="neox"),
    "neox, other sizes": replace(SHAPE, model_family="neox", ffn_hidden_size=52, norm_epsilon=1e-3, rotary_base=500.0,
                                 rotary_percent=0.5),
    "opt": replace(SHAPE, model_family="opt", max_position_embeddings=29),
    "llama, tied": replace(SHAPE, model_family="llama", ffn_hidden_size=52, tie_word_embeddings=True),
    "gpt2, not tied": replace(SHAPE, model_family="gpt2", tie_word_embeddings=False),
    "neox, tied": replace(SHAPE, model_family="neox", tie_word_embeddings=True),
}  # fmt: skip
CONFIGS = {name: completed(config, FAMILIES, LENGTH) for name, config in CONFIGS.items()}
GPT = ("gpt2", "neox", "opt")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"lora_rank": 5, "lora_alpha": 3.0}),
    "lora in the mlp": ("lora", {"lora_rank": 16, "lora_target": ["up", "down"]}),
    "switchlora": ("switchlora", {"lora_rank": 4}),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def build(case: str, name: str, seed: int = 1, **options: Any) -> BuiltModel:
    kind, flags = METHODS[case]
    found = method_class(kind)
    config = options.pop("config", CONFIGS.get(name))
    return build_model(config, found(found.config_class(**flags)), length=LENGTH, seed=seed, **options)


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def disturb(model: BuiltModel) -> None:
    """Norms that differ from ones, biases from zeros, and factors that do not cancel against W."""
    source = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in model.tensors:
            if not tensor.name.endswith(".weight") or len(tensor.shape) == 1:
                count = torch.Size(tensor.shape).numel()
                part = tensor.parameter.view(-1)[tensor.start : tensor.start + count]
                part.add_(torch.randn(count, generator=source), alpha=0.2)


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("llama")])
@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers(case: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = build(case, name, dtype=dtype)
    disturb(model)
    batch = tokens()
    expected = hugging_face(CONFIGS[name], model, dtype)(batch[:, :-1]).logits
    logits = model.module.logits(batch[:, :-1]).transpose(0, 1)
    assert logits.dtype == dtype and logits.shape == expected.shape == (3, LENGTH, WORDS)
    assert expected.std() > 0.5, "there must be something to compare"
    assert (logits - expected).abs().max() <= tolerance
    loss = F.cross_entropy(expected.flatten(0, 1), batch[:, 1:].flatten())
    assert float(model.module(batch)) == pytest.approx(float(loss), abs=tolerance / 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_transformers(name: str) -> None:
    """Of every logical tensor; the tied embedding has one gradient, from both of its uses."""
    model = build("full", name, dtype=torch.float64)
    disturb(model)
    reference, batch = hugging_face(CONFIGS[name], model, torch.float64), tokens()
    logits = reference(batch[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    model.module(batch).backward()
    found = theirs(CONFIGS[name], logical(model, gradients=True))
    expected = {key: p.grad for key, p in reference.named_parameters(remove_duplicate=False)}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-9, key
        if "k_proj.bias" not in key:  # that of keys moves all scores of a query alike
            assert float(gradient.abs().max()) > (1e-4 if "bias" in key else 1e-3), key


@pytest.mark.parametrize("name", GPT)
@torch.no_grad()
def test_a_token_does_not_see_those_after_it(name: str) -> None:
    model = build("switchlora", name)
    batch, changed = tokens()[:, :-1], tokens()[:, :-1]
    changed[:, 12:] = (changed[:, 12:] + 1) % WORDS
    before, after = model.module.logits(batch), model.module.logits(changed)
    assert (before[:12] - after[:12]).abs().max() < 1e-5
    assert (before[12:] - after[12:]).abs().max() > 0.1
    assert torch.allclose(model.module.logits(batch[:, :7]), before[:7], atol=1e-5), "a prefix is a shorter sequence"


@pytest.mark.parametrize("name", GPT)
@torch.no_grad()
def test_order_of_tokens_matters(name: str) -> None:
    """Without positions, a permutation of what was before would give the last token the same logits."""
    model = build("full", name)
    batch = tokens()[:, :-1]
    turned = torch.cat((batch[:, :-1].flip(1), batch[:, -1:]), dim=1)
    assert (model.module.logits(batch)[-1] - model.module.logits(turned)[-1]).abs().max() > 0.05


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", GPT)
def test_initial_weights_depend_on_seed_and_name_alone(name: str) -> None:
    found = effective_weights(build("full", name, seed=5))
    for key, weight in found.items():
        if weight.dim() == 1:
            assert bool((weight == float(key.endswith(".weight"))).all()), key
            continue
        drawn = torch.empty(weight.numel()).normal_(0.0, 0.15, generator=generator(5, key))
        assert torch.equal(weight, drawn.view(weight.shape).double()), key
    other = effective_weights(build("switchlora", name, seed=5))
    assert found.keys() == other.keys()
    assert all((other[key] - weight).abs().max() <= 1e-6 for key, weight in found.items())


@pytest.mark.parametrize("name", GPT)
@pytest.mark.parametrize("case", METHODS)
def test_biases_and_norms_are_trained_whatever_is_adapted(case: str, name: str) -> None:
    model = build(case, name)
    adapted = {layer.name for layer in model.layers}
    for tensor in model.tensors:
        path, kind = tensor.name.rsplit(".", 1)
        assert tensor.parameter.requires_grad is not (kind == "weight" and path in adapted), tensor.name
    blocks = {"lora in the mlp": ("mlp.up", "mlp.down"), "full": ()}
    parts = blocks.get(case, ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"))
    assert [layer.name for layer in model.layers] == [f"layers.{n}.{part}" for n in range(3) for part in parts]


@pytest.mark.parametrize("name", GPT)
def test_logical_tensors_cover_every_parameter_once(name: str) -> None:
    model = build("lora", name)
    covered: dict[int, list[tuple[int, int]]] = {}
    for tensor in model.tensors:
        end = tensor.start + math.prod(tensor.shape)
        covered.setdefault(id(tensor.parameter), []).append((tensor.start, end))
    parameters = {id(p): p.numel() for p in model.module.parameters()}
    assert covered.keys() == parameters.keys()
    for key, ranges in covered.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == ends[:-1] and ends[-1] == parameters[key]
    assert len({tensor.name for tensor in model.tensors}) == len(model.tensors)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama, tied", "neox, tied"])
def test_the_tied_head_is_the_embedding(name: str) -> None:
    model = build("full", name)
    assert model.module.output.weight is model.module.embedding.weight
    assert [t.name for t in model.tensors if t.parameter is model.module.embedding.weight] == ["embedding.weight"]
    model.module.bfloat16()
    assert model.module.output.weight is model.module.embedding.weight
    for name in ("neox", "llama", "gpt2, not tied"):
        other = build("full", name)
        assert other.module.output.weight is not other.module.embedding.weight
        assert "output.weight" in {tensor.name for tensor in other.tensors}


@pytest.mark.parametrize("name", GPT)
def test_gate_is_no_matrix_of_a_gpt(name: str) -> None:
    kind = method_class("lora")
    method = kind(kind.config_class(lora_rank=4, lora_target=["gate", "up"]))
    with pytest.raises(ConfigError, match="--lora-target matches no layer; got 'gate'; allowed: q, k, v, o, up, down"):
        build_model(CONFIGS[name], method, length=LENGTH, seed=1)


# ---------------------------------------------------------------- recomputation


@pytest.mark.parametrize("name", GPT)
@pytest.mark.parametrize("case", METHODS)
def test_recomputation_changes_nothing_but_the_work(case: str, name: str) -> None:
    found = []
    for recompute in (False, True):
        model = build(case, name, recompute=recompute)
        disturb(model)
        calls: list[int] = []
        for number, block in enumerate(model.module.layers):
            block.mlp.linear_fc1.register_forward_hook(lambda *args, n=number, to=calls: to.append(n))
        loss = model.module(tokens())
        loss.backward()
        assert calls == ([0, 1, 2, 2, 1, 0] if recompute else [0, 1, 2])
        found.append((loss.detach(), {key: p.grad for key, p in model.module.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (loss, gradients) = found
    assert torch.equal(loss, plain_loss) and plain.keys() == gradients.keys()
    for key, gradient in plain.items():
        assert float(gradient.abs().max()) > 0 and torch.equal(gradients[key], gradient), key
