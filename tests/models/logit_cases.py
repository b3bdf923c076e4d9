"""Ranks of test_parallel_logits: models divided over tensor-parallel ranks against transformers' whole ones.

Every rank builds the whole model too, moves it away from its initial weights, and gives them to the divided model and
to transformers'. Widths of the feed-forward part and the vocabulary are odd; the last rank has padding of both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call

from megalowrank.config import ModelConfig, ParallelConfig
from megalowrank.engine.partial import NormOverRanks, PartialGradients
from megalowrank.methods import method_class
from megalowrank.models.architecture import FAMILIES, completed
from megalowrank.models.build import BuiltModel, LogicalTensor, build_model
from megalowrank.models.projections import projections
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.wire import partial_parameters
from tests.models.hugging_face import Tensors, hugging_face, logical, theirs

LENGTH, WORDS, ROWS = 22, 71, 3
SHAPE = {"num_layers": 2, "hidden_size": 48, "vocab_size": WORDS, "init_method_std": 0.15}
CONFIGS = {
    "llama": ModelConfig(**SHAPE, model_family="llama", num_attention_heads=6, num_query_groups=2, ffn_hidden_size=53,
                         rotary_base=500.0, norm_epsilon=1e-3),
    "gpt2": ModelConfig(**SHAPE, model_family="gpt2", num_attention_heads=4, ffn_hidden_size=57),
    "neox": ModelConfig(**SHAPE, model_family="neox", num_attention_heads=4, ffn_hidden_size=59, rotary_percent=0.5),
    "opt": ModelConfig(**SHAPE, model_family="opt", num_attention_heads=4, ffn_hidden_size=61),
}  # fmt: skip
CONFIGS = {name: completed(config, FAMILIES, LENGTH) for name, config in CONFIGS.items()}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 5, "lora_alpha": 3.0},
    "switchlora": {"lora_rank": 4},
    "relora": {"lora_rank": 7, "lora_alpha": 4.0},
    "golore": {"lora_rank": 7, "proj_scale": 0.5},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def tokens() -> torch.Tensor:
    return torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def build(method: str, family: str, dtype: torch.dtype, place: Placement | None = None) -> BuiltModel:
    kind = method_class(method)
    built = kind(kind.config_class(**METHODS[method]))
    return build_model(CONFIGS[family], built, length=LENGTH, seed=1, dtype=dtype, place=place)


def disturb(model: BuiltModel) -> None:
    """Norms that differ from ones, biases from zeros, and factors that do not cancel against W."""
    source = torch.Generator().manual_seed(9)
    for tensor in model.tensors:
        if not tensor.name.endswith(".weight") or len(tensor.shape) == 1:
            part = tensor.parameter.data.view(-1)[tensor.start : tensor.start + tensor.numel]
            part.add_(torch.randn(tensor.numel, generator=source), alpha=0.2)


# ---------------------------------------------------------------- transformers' whole model


class Reference:
    """Logits [B, S, V], loss, and gradients by logical name of what is trained, as transformers computes them."""

    def __init__(self, method: str, family: str, dtype: torch.dtype) -> None:
        whole, config = build(method, family, dtype), CONFIGS[family]
        disturb(whole)
        self.weights = logical(whole)
        trained = {t.name for t in whole.tensors if t.parameter.requires_grad}
        leaves = {name: value.to(dtype).requires_grad_(name in trained) for name, value in self.weights.items()}
        weights = theirs(config, with_factors(leaves, {layer.name: layer.scale for layer in whole.layers}))
        batch = tokens()
        self.logits = functional_call(hugging_face(config, whole, dtype), weights, (batch[:, :-1],)).logits
        loss = F.cross_entropy(self.logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.loss = float(loss.detach())
        self.gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        self.norm = float(torch.stack([g.double().norm() for g in self.gradients.values()]).norm())


def with_factors(leaves: Tensors, scales: dict[str, float]) -> Tensors:
    """Weights and biases, with s·BᵀA added where there are factors; gradients flow through."""
    found = {name: value for name, value in leaves.items() if name.endswith((".weight", ".bias"))}
    for name, scale in scales.items():
        found[f"{name}.weight"] = found[f"{name}.weight"] + scale * leaves[f"{name}.B"].t() @ leaves[f"{name}.A"]
    return found


# ---------------------------------------------------------------- our divided model


def divided(case: dict[str, Any], weights: Tensors, groups: Groups) -> BuiltModel:
    """This rank's part of the model of a case, with the logical tensors ``weights``."""
    family = case["family"]
    ride = dict.fromkeys(projections(CONFIGS[family]), case["schedule"] == "ride")
    model = build(case["method"], family, DTYPES[case["dtype"]], Placement(groups.wire(), ride=ride))
    assert [tensor.name for tensor in model.tensors] == list(weights)
    for tensor in model.tensors:
        tensor.fill(weights[tensor.name])
    return model


def gathered_logits(model: BuiltModel, batch: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[B, S, V] from the vocabulary rows of all ranks, without padding."""
    own = model.module.logits(batch).transpose(0, 1).contiguous()
    parts = [torch.empty_like(own) for _ in range(groups.tensor_size)]
    dist.all_gather(parts, own, group=groups.tensor)
    return torch.cat(parts, dim=-1)[..., :WORDS]


def gathered_gradient(tensor: LogicalTensor, groups: Groups) -> torch.Tensor:
    """The gradient of a whole logical tensor; that of padding must be zero."""
    assert tensor.parameter.grad is not None
    block = tensor.parameter.grad.reshape(-1)[tensor.start : tensor.start + tensor.numel].view(tensor.stored)
    real = block[tuple(slice(part.real) for part in tensor.shares)]
    assert int(block.count_nonzero()) == int(real.count_nonzero()), f"{tensor.name}: padding has a gradient"
    if not tensor.split:
        return real
    whole = real.new_zeros(tensor.shape)
    whole[tuple(slice(part.start, part.stop) for part in tensor.shares)] = real
    dist.all_reduce(whole, group=groups.tensor)
    return whole


def compare_with(reference: Reference, case: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Largest differences of logits, of the loss, and, relative to the norm of all, of gradients and of that norm."""
    model, batch = divided(case, reference.weights, groups), tokens()
    with torch.no_grad():
        logits = gathered_logits(model, batch[:, :-1], groups)
    partial = PartialGradients(partial_parameters(model.module), groups.tensor, 1, per_update=True)
    loss = model.module(batch)
    loss.backward()
    partial.close()
    norm = NormOverRanks(groups.tensor)([p for p in model.module.parameters() if p.requires_grad])
    found = {t.name: gathered_gradient(t, groups) for t in model.tensors if t.parameter.requires_grad}
    assert found.keys() == reference.gradients.keys() and logits.shape == reference.logits.shape
    apart = {name: float((gradient - reference.gradients[name]).abs().max()) for name, gradient in found.items()}
    return {
        "logits": float((logits - reference.logits).abs().max()),
        "loss": abs(float(loss.detach()) - reference.loss),
        "norm": abs(float(norm) - reference.norm) / reference.norm,
        "gradient": max(apart.values()) / reference.norm,
        "spread": float(reference.logits.std()),
        "padded": sum(tensor.numel - _real(tensor) for tensor in model.tensors),
        "partial": len(partial.parameters),
    }


def _real(tensor: LogicalTensor) -> int:
    return torch.Size([part.real for part in tensor.shares]).numel()


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``compare_with`` of every case: ``method``, ``family``, ``dtype``, ``sequence`` and ``schedule``.

    A whole model can only be built while megatron-core knows of no tensor-parallel ranks.
    """
    initialize_groups(ParallelConfig())
    keys = [(case["method"], case["family"], case["dtype"]) for case in cases]
    references = {key: Reference(*key[:2], DTYPES[key[2]]) for key in dict.fromkeys(keys)}
    found = []
    for case, key in zip(cases, keys, strict=True):
        sizes = ParallelConfig(tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=case["sequence"])
        found.append(compare_with(references[key], case, initialize_groups(sizes)))
    return found
