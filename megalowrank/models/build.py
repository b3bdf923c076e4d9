"""From configuration to a model with weights: logical names, which matrices are adapted, initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankFactors, folded_weights
from megalowrank.lowrank.fold import RESIDUAL_DTYPES
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.lowrank.select import adapted, check_patterns
from megalowrank.methods.base import Adapters, Method
from megalowrank.models.architecture import GPT_FAMILIES, LLAMA_FAMILIES, completed
from megalowrank.models.transformer import Chosen, Transformer, projections
from megalowrank.parallel.rng import generator

PARTS = {
    "attention": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
}


Initial = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor as the whole model knows it: elements [start, start + numel of shape) of a parameter."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    shape: tuple[int, ...]

    @property
    def is_factor(self) -> bool:
        """Whether it is A or B of an adapted matrix."""
        return self.name.endswith((".A", ".B"))

    def fill(self, value: torch.Tensor) -> None:
        """Overwrite it in the whole, unsharded parameter; ``value`` has its shape."""
        flat = self.parameter.data.view(-1)[self.start : self.start + value.numel()]
        flat.copy_(value.reshape(-1))


@dataclass
class BuiltModel:
    """A model with its adapted matrices in global order and the logical names of all its tensors."""

    module: Transformer
    layers: list[LowRankFactors]
    tensors: list[LogicalTensor]
    warnings: list[str]


def build_llama(config: ModelConfig, method: Method, *, length: int, **options: Any) -> BuiltModel:
    """A LLaMA; see ``build_model``."""
    return build_model(completed(config, LLAMA_FAMILIES, length), method, length=length, **options)


def build_gpt(config: ModelConfig, method: Method, *, length: int, **options: Any) -> BuiltModel:
    """A GPT-2, or a GPT-NeoX where ``config`` names that family; see ``build_model``."""
    return build_model(completed(config, GPT_FAMILIES, length), method, length=length, **options)


def build_model(
    config: ModelConfig,
    method: Method,
    *,
    length: int,
    seed: int,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
    forward_dtype: torch.dtype | None = None,
    fold_residual: str = "int16",
    initial: Initial | None = None,
) -> BuiltModel:
    """Build and initialise a model on the CPU; every rank gets the same weights whatever its layout.

    ``config`` is a completed one, ``length`` the longest sequence, ``dtype`` the precision of this model,
    ``forward_dtype`` that of the forward pass if an engine casts it; ``initial`` gives the weights by logical name and
    shape instead of drawing them. Raises ConfigError for patterns that
    match nothing.
    """
    chosen = _choose(config, method.adapters())
    module = Transformer(config, length, chosen, recompute, dtype)
    layers, tensors = _name(module)
    for tensor in tensors:
        if initial is None:
            _draw(tensor, seed, config.init_method_std)
        elif not tensor.is_factor:
            tensor.fill(initial(tensor.name, tensor.shape))
    forward_dtype = forward_dtype or dtype
    warnings = method.initialise(layers, seed, forward_dtype)
    if forward_dtype == torch.bfloat16:
        for folded in folded_weights(layers):
            folded.keep_residual(RESIDUAL_DTYPES[fold_residual])
    return BuiltModel(module, layers, tensors, warnings)


def _choose(config: ModelConfig, adapters: Adapters | None) -> list[Chosen]:
    """Which projection of which block gets factors."""
    blocks = projections(config)
    if adapters is None:
        return [dict.fromkeys(blocks) for _ in range(config.num_layers or 0)]
    chosen: list[Chosen] = []
    names: list[str] = []
    for number in range(config.num_layers or 0):
        choice: Chosen = {}
        for projection, parts in blocks.items():
            logical = [f"layers.{number}.{projection.split('.')[0]}.{part}" for part, _ in parts]
            names += logical
            choice[projection] = adapters.spec if adapted(projection, logical, adapters.patterns) else None
            if choice[projection] is not None:
                columns = config.ffn_hidden_size if projection == "mlp.down" else config.hidden_size
                _check_rank(adapters.spec.rank, logical, [rows for _, rows in parts], columns or 0)
        chosen.append(choice)
    check_patterns(adapters.patterns, names)
    return chosen


def _check_rank(rank: int, names: list[str], rows: list[int], columns: int) -> None:
    """Refuse factors that are larger than their matrix."""
    for name, count in zip(names, rows, strict=True):
        if rank > min(count, columns):
            raise ConfigError(
                f"--lora-rank is larger than the matrix {name} [{count}, {columns}]",
                rank,
                f"<= {min(count, columns)}, or a --lora-target that leaves it out",
            )


def _name(module: Transformer) -> tuple[list[LowRankFactors], list[LogicalTensor]]:
    """Give every matrix its logical name and global index, and list all logical tensors."""
    layers: list[LowRankFactors] = []
    tensors = list(_whole(module, "embedding"))
    if module.position is not None:
        tensors += _whole(module, "position")
    for number, block in enumerate(module.layers):
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            tensors += _whole(module, f"layers.{number}.{norm}")
        for part, paths in PARTS.items():
            for path in paths:
                linear = block.get_submodule(path)
                assert isinstance(linear, (LowRankColumnParallelLinear, LowRankRowParallelLinear))
                _name_linear(linear, f"layers.{number}.{part}", layers, tensors)
    tensors += _whole(module, "norm")
    set_tensor_model_parallel_attributes(module.embedding.weight, True, 0, 1)
    if module.output.weight is not module.embedding.weight:
        tensors += _whole(module, "output")
        set_tensor_model_parallel_attributes(module.output.weight, True, 0, 1)
    return layers, tensors


def _whole(module: Transformer, path: str) -> Iterator[LogicalTensor]:
    """The parameters of a module that are logical tensors as they are."""
    for name, parameter in module.get_submodule(path).named_parameters():
        yield LogicalTensor(f"{path}.{name}", parameter, 0, tuple(parameter.shape))


def _name_linear(
    linear: LowRankColumnParallelLinear | LowRankRowParallelLinear,
    prefix: str,
    layers: list[LowRankFactors],
    tensors: list[LogicalTensor],
) -> None:
    columns, row = linear.weight.shape[1], 0
    split = 0 if isinstance(linear, LowRankColumnParallelLinear) else 1
    set_tensor_model_parallel_attributes(linear.weight, True, split, 1)
    for name, rows in linear.blocks:
        tensors.append(LogicalTensor(f"{prefix}.{name}.weight", linear.weight, row * columns, (rows, columns)))
        if linear.bias is not None:
            tensors.append(LogicalTensor(f"{prefix}.{name}.bias", linear.bias, row, (rows,)))
        row += rows
    for factors in linear.factors:
        factors.name, factors.index = f"{prefix}.{factors.name}", len(layers)
        layers.append(factors)
        set_tensor_model_parallel_attributes(factors.A if split else factors.Bt, True, 1, 1)
        for factor, parameter in (("A", factors.A), ("B", factors.Bt)):
            tensors.append(LogicalTensor(f"{factors.name}.{factor}", parameter, 0, tuple(parameter.shape)))


@torch.no_grad()
def _draw(tensor: LogicalTensor, seed: int, std: float) -> None:
    """N(0, std) for matrices, ones for norms, zeros for biases; drawn whole and keyed by the logical name."""
    kind = tensor.name.rsplit(".", 1)[-1]
    if kind not in ("weight", "bias"):
        return
    count = torch.Size(tensor.shape).numel()
    target = tensor.parameter.data.view(-1)[tensor.start : tensor.start + count]
    if len(tensor.shape) == 1:
        target.fill_(float(kind == "weight"))
    else:
        target.copy_(torch.empty(count).normal_(0.0, std, generator=generator(seed, tensor.name)))
