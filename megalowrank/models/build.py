"""From configuration to a model with weights: logical names, which matrices are adapted, initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.lowrank.factors import LowRankFactors, LowRankSpec, folded_weights
from megalowrank.lowrank.fold import RESIDUAL_DTYPES, FrozenTensor
from megalowrank.lowrank.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from megalowrank.lowrank.select import adapted, check_patterns
from megalowrank.methods.base import Adapters, Method
from megalowrank.models.architecture import GPT_FAMILIES, LLAMA_FAMILIES, check_tensor_parallel, completed
from megalowrank.models.projections import check_table, input_width, projections, shortcut_specs
from megalowrank.models.shortcuts import ShortcutLayer
from megalowrank.models.task_head import TaskHead
from megalowrank.models.transformer import Chosen, Placement, Transformer
from megalowrank.parallel.partition import Share, share
from megalowrank.parallel.rng import generator
from megalowrank.parallel.wire import mark_shared

PARTS = {
    "attention": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
}


Initial = Callable[[str, tuple[int, ...]], torch.Tensor | None]


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor as the whole model knows it, and this rank's part of it.

    The part is the padded block of ``shares`` (one per dimension) that begins at element ``start`` of ``parameter``.
    ``replica``: another pipeline stage holds the same tensor, and counts it.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    shares: tuple[Share, ...]
    replica: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole tensor."""
        return tuple(part.size for part in self.shares)

    @property
    def stored(self) -> tuple[int, ...]:
        """Sizes of the block on this rank, padding included."""
        return tuple(part.padded for part in self.shares)

    @property
    def numel(self) -> int:
        """Elements of the block on this rank."""
        return torch.Size(self.stored).numel()

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return any(part.padded < part.size for part in self.shares)

    @property
    def is_factor(self) -> bool:
        """Whether it is A or B of an adapted matrix."""
        return self.name.endswith((".A", ".B"))

    @property
    def is_snapshot(self) -> bool:
        """Whether it is the second pair of factors, which the linear subtracts."""
        return self.name.endswith((".A_snapshot", ".B_snapshot"))

    def fill(self, value: torch.Tensor) -> None:
        """Overwrite this rank's part, in a parameter no engine has cut; ``value`` is the whole tensor."""
        for dim, part in enumerate(self.shares):
            value = part.take(value, dim)
        flat = self.parameter.data.view(-1)[self.start : self.start + self.numel]
        flat.copy_(value.reshape(-1))


@dataclass(frozen=True)
class MatrixShape:
    """An adapted matrix of the model, whatever rank holds it."""

    name: str
    rank: int
    out_features: int
    in_features: int
    scale: float = 1.0


@dataclass
class BuiltModel:
    """This rank's part of a model: its adapted matrices in global order and the logical names of its tensors.

    ``names`` are those of the adapted matrices, and shortcuts, of the whole model by global index.
    """

    module: Transformer
    layers: list[LowRankFactors]
    tensors: list[LogicalTensor]
    warnings: list[str]
    names: tuple[str, ...] = ()


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
    place: Placement | None = None,
) -> BuiltModel:
    """Build and initialise this rank's ``place`` of a model on the CPU (default: all of it).

    The weights are those of the same model whatever the layout: every tensor is drawn whole, keyed by its name, and
    cut. ``config`` is a completed one, ``length`` the longest sequence, ``dtype`` the precision of this model,
    ``forward_dtype`` that of the forward pass if an engine casts it; ``initial`` gives the weights by logical name
    and shape instead of drawing them, but for those of which it knows nothing (None). Raises ConfigError for patterns
    that match nothing and for sizes that tensor-parallel ranks cannot share.
    """
    place = place or Placement()
    check_tensor_parallel(config, place.wire.size)
    adapters = method.adapters()
    chosen, matrices = _choose(config, adapters)
    shortcuts, hidden = shortcut_specs(config, adapters), config.hidden_size or 0
    matrices += [m for name, spec in shortcuts.items() for m in _shapes([spec], [name], [hidden], hidden)]
    names = tuple(matrix.name for matrix in matrices)
    module = Transformer(config, length, chosen, recompute, dtype, place, shortcuts)
    layers, tensors = _name(module, {name: index for index, name in enumerate(names)})
    if adapters is not None and adapters.frozen:
        module.frozen = [FrozenTensor(p.requires_grad_(False)) for p in _others(module, layers)]
    elif adapters is not None:
        module.frozen = [FrozenTensor(p) for p in _others(module, layers) if not p.requires_grad]
    if adapters is not None and adapters.shared:
        for parameter in _others(module, layers):
            mark_shared(parameter)
    forward_dtype = forward_dtype or dtype
    source = _Source(config, method, seed, forward_dtype, initial, {matrix.name: matrix for matrix in matrices})
    for tensor in tensors:
        source.fill(tensor)
    if forward_dtype == torch.bfloat16:
        for folded in folded_weights(layers):
            folded.keep_residual(RESIDUAL_DTYPES[fold_residual])
    return BuiltModel(module, layers, tensors, method.warnings(matrices), names)


def _others(module: Transformer, layers: Sequence[LowRankFactors]) -> list[Any]:
    """The parameters that are neither factors nor under them."""
    adapted = {id(p) for layer in layers for p in (layer.A, layer.Bt, layer.weight.parameter)}
    adapted |= {id(fixed.parameter) for layer in layers for fixed in layer.fixed}
    return [p for p in module.parameters() if id(p) not in adapted]


@dataclass(frozen=True)
class _Source:
    """Where initial values come from; ``matrices`` are the adapted ones by name."""

    config: ModelConfig
    method: Method
    seed: int
    forward_dtype: torch.dtype
    initial: Initial | None
    matrices: dict[str, MatrixShape]

    @torch.no_grad()
    def fill(self, tensor: LogicalTensor) -> None:
        """Set this rank's part of a logical tensor."""
        matrix = self.matrices.get(tensor.name.rsplit(".", 1)[0])
        if matrix is None:
            tensor.fill(self._plain(tensor))
        elif tensor.name.endswith(".weight"):
            tensor.fill(self._without_factors(tensor, matrix))
        elif tensor.is_factor:
            factors = self.method.initial_factors(matrix, self.seed, self.forward_dtype)
            tensor.fill(factors[tensor.name.endswith(".B")])
        elif tensor.is_snapshot:
            tensor.fill(torch.zeros(tensor.shape, dtype=tensor.parameter.dtype))
        else:
            tensor.fill(self._plain(tensor))

    def _without_factors(self, tensor: LogicalTensor, matrix: MatrixShape) -> torch.Tensor:
        """W - s·B·A, made whole so that no layout changes its rounding."""
        weight = self._plain(tensor)
        A, Bt = (
            factor.to(weight.dtype) for factor in self.method.initial_factors(matrix, self.seed, self.forward_dtype)
        )
        return weight.addmm_(-Bt.t(), A, alpha=matrix.scale)

    def _plain(self, tensor: LogicalTensor) -> torch.Tensor:
        """The whole tensor as a model without factors has it: given, or N(0, std), ones for norms, zeros for biases."""
        dtype = tensor.parameter.dtype
        given = None if self.initial is None else self.initial(tensor.name, tensor.shape)
        if given is not None:
            return given.to(dtype, copy=True)
        if len(tensor.shape) == 1:
            return torch.full(tensor.shape, float(tensor.name.endswith(".weight")), dtype=dtype)
        source = generator(self.seed, tensor.name)
        drawn = torch.empty(torch.Size(tensor.shape).numel()).normal_(
            0.0, self.config.init_method_std, generator=source
        )
        return drawn.view(tensor.shape).to(dtype)


def _choose(config: ModelConfig, adapters: Adapters | None) -> tuple[list[Chosen], list[MatrixShape]]:
    """Which projection of which block gets factors, and all adapted matrices of the model in order."""
    blocks = projections(config)
    if adapters is None:
        return [dict.fromkeys(blocks) for _ in range(config.num_layers or 0)], []
    chosen: list[Chosen] = []
    names: list[str] = []
    matrices: list[MatrixShape] = []
    for number in range(config.num_layers or 0):
        choice: Chosen = {}
        for projection, parts in blocks.items():
            logical = [f"layers.{number}.{projection.split('.')[0]}.{part}" for part, _ in parts]
            names += logical
            choice[projection] = None
            if adapted(projection, logical, adapters.patterns):
                specs = choice[projection] = tuple(adapters.spec_of(name) for name in logical)
                rows = [count for _, count in parts]
                matrices += _shapes(specs, logical, rows, input_width(config, projection))
        chosen.append(choice)
    check_patterns(adapters.patterns, names)
    check_table(config, adapters, names, [matrix.name for matrix in matrices])
    return chosen, matrices


def _shapes(
    specs: Sequence[LowRankSpec | None], names: Sequence[str], rows: Sequence[int], columns: int
) -> list[MatrixShape]:
    """The matrices of a projection that have factors; factors that are larger than their matrix are refused."""
    found = []
    for spec, name, count in zip(specs, names, rows, strict=True):
        if spec is None:
            continue
        if spec.rank // spec.chunks > min(count, columns):
            raise ConfigError(
                f"--lora-rank is larger than the matrix {name} [{count}, {columns}]",
                spec.rank // spec.chunks,
                f"<= {min(count, columns)}, or a --lora-target that leaves it out",
            )
        found.append(MatrixShape(name, spec.rank, count, columns, spec.scale))
    return found


def _name(module: Transformer, indices: Mapping[str, int]) -> tuple[list[LowRankFactors], list[LogicalTensor]]:
    """Give every matrix its logical name and global index, and list all logical tensors."""
    layers: list[LowRankFactors] = []
    tensors: list[LogicalTensor] = []
    if module.embedding is not None:
        tensors.append(_vocabulary(module, "embedding", replica=not module.place.begins))
    tensors += _whole("position", module.position)
    for number, block in zip(module.numbers, module.layers, strict=True):
        layers += _name_block(number, block, tensors)
    for layer in layers:
        layer.index = indices[layer.name]
    layers.sort(key=lambda layer: layer.index)
    tensors += _whole("norm", module.norm)
    if isinstance(module.output, TaskHead):
        tensors += _whole("score", module.output)
    elif module.output is not None and (
        module.embedding is None or module.output.weight is not module.embedding.weight
    ):
        tensors.append(_vocabulary(module, "output"))
    return layers, tensors


def _name_block(number: int, block: torch.nn.Module, tensors: list[LogicalTensor]) -> list[LowRankFactors]:
    """The factors of a block; its tensors are appended to ``tensors``."""
    layers: list[LowRankFactors] = []
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        tensors += _whole(f"layers.{number}.{norm}", block.get_submodule(norm))
    for part, paths in PARTS.items():
        for path in paths:
            linear = block.get_submodule(path)
            assert isinstance(linear, (LowRankColumnParallelLinear, LowRankRowParallelLinear))
            tensors += _name_linear(linear, f"layers.{number}.{part}")
            layers += linear.factors
    if isinstance(block, ShortcutLayer):
        layers += block.factors()
        for factors in block.factors():
            tensors += _factors(factors)
    return layers


def _vocabulary(module: Transformer, path: str, replica: bool = False) -> LogicalTensor:
    """The table of the embedding or of the head, split by rows."""
    weight = module.get_submodule(path).weight
    assert isinstance(weight, torch.nn.Parameter)
    return LogicalTensor(f"{path}.weight", weight, 0, (module.vocabulary, share(weight.shape[1])), replica)


def _whole(path: str, module: torch.nn.Module | None) -> Iterator[LogicalTensor]:
    """The parameters of a module that every tensor-parallel rank holds whole."""
    for name, parameter in () if module is None else module.named_parameters():
        yield LogicalTensor(f"{path}.{name}", parameter, 0, tuple(share(size) for size in parameter.shape))


def _factors(factors: LowRankFactors) -> Iterator[LogicalTensor]:
    rank = share(factors.rank)
    yield LogicalTensor(f"{factors.name}.A", factors.A, 0, (rank, factors.columns))
    yield LogicalTensor(f"{factors.name}.B", factors.Bt, 0, (rank, factors.rows))


def _name_linear(
    linear: LowRankColumnParallelLinear | LowRankRowParallelLinear, prefix: str
) -> Iterator[LogicalTensor]:
    columns, row = linear.columns, 0
    for name, rows in linear.blocks:
        yield LogicalTensor(f"{prefix}.{name}.weight", linear.weight, row * columns.padded, (rows, columns))
        if linear.bias is not None:
            yield LogicalTensor(f"{prefix}.{name}.bias", linear.bias, row, (rows,))
        row += rows.padded
    for factors in linear.factors:
        factors.name, rank = f"{prefix}.{factors.name}", share(factors.rank)
        yield from _factors(factors)
        for fixed in factors.fixed:
            if fixed.name.endswith("_snapshot"):
                yield LogicalTensor(f"{factors.name}.{fixed.name}", fixed.parameter, 0, (rank, fixed.length))
