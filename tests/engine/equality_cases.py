"""Ranks of the equality matrix: the same run under DeepSpeed and on one dense, unsharded process.

A case is a JSON object: ``method``, ``flags`` of the method, ``bf16``, ``micro`` (micro-batches of a rank per
update), ``clip``, ``recompute``, ``stage`` and ``zero`` (more keys of ``zero_optimization``).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine, StepResult
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.setup import make_optimizer
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.lowrank.fold import FoldedWeight
from megalowrank.lowrank.probe import Take, probe_gradients
from megalowrank.methods import method_class
from megalowrank.methods.base import Context, Method
from megalowrank.models.build import BuiltModel, build_gpt, build_llama
from megalowrank.parallel.collectives import mean_over, sum_over
from megalowrank.parallel.groups import Groups, initialize_groups

STEPS, LR, SEED = 6, 5e-3, 3
MODEL = {
    "num_layers": 2, "hidden_size": 12, "ffn_hidden_size": 17, "num_attention_heads": 2, "num_query_groups": 1,
    "vocab_size": 29,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": MODEL,
    **{family: {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 29, "model_family": family}
       for family in ("gpt2", "neox")},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 5, "lora_init": "classic"},
    "switchlora": {"lora_rank": 5, "switch_interval": 4, "switch_freeze_steps": 2, "switch_descent_rate": 1.0},
    "relora": {"lora_rank": 5, "relora_interval": 2, "relora_reset": "magnitude", "relora_prune_ratio": 0.7},
    "golore": {"lora_rank": 5, "update_proj_gap": 2, "rand_ratio": 0.6},
    "galore": {"lora_rank": 5, "update_proj_gap": 3},
    "lte": {"lora_rank": 5, "lte_merge_interval": 2},
    "heterolora": {"lora_rank": 5, "hetero_interval": 2, "hetero_warmup_iters": 2, "hetero_score": "snip",
                   "hetero_budget": 0.5},
}  # fmt: skip
MOMENTS = ("master", "exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]


def batch(step: int, micro: int, rows: int = 4) -> torch.Tensor:
    """Global micro-batch ``micro`` of ``step``: [rows, 10] tokens, the same on every rank."""
    source = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(0, MODEL["vocab_size"], (rows, 10), generator=source)


def build(
    method_name: str,
    low: bool,
    overrides: dict[str, Any],
    recompute: bool = False,
    seed: int = SEED,
    family: str = "llama",
) -> tuple[Method, BuiltModel]:
    kind = method_class(method_name)
    method = kind(kind.config_class(**{**METHODS[method_name], **overrides}))
    forward = torch.bfloat16 if low else torch.float32
    make = build_llama if family == "llama" else build_gpt
    return method, make(
        ModelConfig(**FAMILIES[family]), method, length=9, seed=seed, recompute=recompute, forward_dtype=forward
    )


def context(model: BuiltModel, engine: Engine, rank: int, world: int, seed: int = SEED) -> Context:
    return Context(
        model.layers, engine.state, seed, STEPS, rank, world, host_allocator(False), engine=engine, names=model.names
    )


# ---------------------------------------------------------------- what is compared


def snapshot(model: BuiltModel, engine: Engine, method: Method) -> Tensors:
    """Whole masters, moments, forward copies, weights with residual, pools and clocks, in float32.

    Collective. ``gathered`` is how far the copies that ZeRO-3 holds whole are from the shards.
    """
    local = _optimizer_state(model, engine)
    sums = dict(local) if engine.state.masters_sharded else {}
    sums.update(_pools(method))
    sharded = {name: p for name, p in model.module.named_parameters() if hasattr(p, "ds_tensor")}
    sums.update({f"shard/{name}": _from_shard(p) for name, p in sharded.items()})
    weights = {f"weight/{i}": folded for i, folded in enumerate(folded_weights(model))}
    sums.update({name: _from_piece(folded) for name, folded in weights.items() if not _is_whole(folded)})
    found = {**local, **_sum_all(sums, engine.group)}
    found.update({name: folded.value().float().clone() for name, folded in weights.items() if _is_whole(folded)})
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            shards = found.get(f"shard/{name}")
            found[f"forward/{name}"] = parameter.data.reshape(-1).float().clone() if shards is None else shards
    found["gathered"] = torch.tensor([0.0, *_strayed(sharded, found)])
    found["births"] = torch.from_numpy(engine.state.clocks.births.copy())
    return {name: tensor for name, tensor in found.items() if not name.startswith("shard/")}


def folded_weights(model: BuiltModel) -> list[FoldedWeight]:
    """Every frozen W once, in the order of the model."""
    return list({id(layer.weight): layer.weight for layer in model.layers}.values())


def numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has taken it apart."""
    return int(torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel())


def _optimizer_state(model: BuiltModel, engine: Engine) -> Tensors:
    names = {id(p): n for n, p in model.module.named_parameters()}
    found = {
        f"{kind}/{n}": torch.zeros(numel(p))
        for n, p in model.module.named_parameters() if p.requires_grad for kind in MOMENTS
    }  # fmt: skip
    cuts = [(partition, fragment) for partition in engine.state.partitions for fragment in partition.fragments]
    for partition, fragment in cuts:
        here = slice(fragment.offset, fragment.offset + fragment.numel)
        there = slice(fragment.start, fragment.start + fragment.numel)
        for kind in MOMENTS:
            found[f"{kind}/{names[id(fragment.parameter)]}"][there] = getattr(partition, kind)[here]
    return found


def _pools(method: Method) -> Tensors:
    found = {}
    for saved in method.saved_tensors():
        whole = torch.zeros(saved.shape)
        whole[saved.first :: saved.step] = saved.rows
        found[f"pool/{saved.name}"] = whole.view(-1)
    return found


def _from_shard(parameter: Any) -> torch.Tensor:
    """Zeros with this rank's ZeRO-3 shard in its place."""
    padded = parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * padded
    own = max(0, min(padded, parameter.ds_numel - start))
    whole = torch.zeros(parameter.ds_numel)
    whole[start : start + own] = parameter.ds_tensor.data[:own]
    return whole


def _is_whole(folded: FoldedWeight) -> bool:
    return folded.locate().flat.numel() == folded.out_features * folded.in_features


def _from_piece(folded: FoldedWeight) -> torch.Tensor:
    """Zeros with this rank's part of W in its place."""
    whole, piece = torch.zeros(folded.out_features * folded.in_features), folded.locate()
    whole[piece.start : piece.start + piece.flat.numel()] = folded.value()
    return whole


def _sum_all(tensors: Tensors, group: Any) -> Tensors:
    """Sum over ranks in one collective; exact, as every element has one owner."""
    if not tensors:
        return {}
    flat = sum_over(torch.cat(list(tensors.values())), group)
    return dict(zip(tensors, flat.split([t.numel() for t in tensors.values()]), strict=True))


def _strayed(parameters: dict[str, Any], found: Tensors) -> Iterator[float]:
    for name, parameter in parameters.items():
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            yield float((parameter.data.reshape(-1).float() - found[f"shard/{name}"]).abs().max())


# ---------------------------------------------------------------- the two runs


@dataclass
class Run:
    """Losses of all updates and the state after the last.

    ``switched`` counts the vectors that were switched, ``calls`` the forward passes of the first block;
    ``counters`` are the method's own.
    """

    losses: list[float]
    tensors: Tensors
    switched: int = 0
    overflowed: bool = False
    calls: int = 0
    counters: dict[str, float] = field(default_factory=dict)


class GroupedDenseEngine(DenseEngine):
    """Adds up gradients and losses as data-parallel ranks do, so that the result is the same to the last bit."""

    def train_step(self, micro_batches: Sequence[Any], lr: float) -> StepResult:
        """``micro_batches`` is a list of groups of (rank, tokens); gradients are added inside a group first."""
        self.module.train()
        count = sum(len(group) for group in micro_batches)
        total, losses = None, []
        for group in micro_batches:
            for rank, tokens in group:
                loss = self.module(tokens)
                (loss / count).backward()
                losses.append((rank, loss.detach()))
            found = [p.grad for p in self._parameters]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
            for parameter in self._parameters:
                parameter.grad = None
        for parameter, gradient in zip(self._parameters, total or [], strict=True):
            parameter.grad = gradient
        result = super().train_step([], lr)
        return StepResult(mean_of_ranks(losses), result.grad_norm, result.applied)

    def probe(self, micro_batches: Sequence[Any], weights: Sequence[FoldedWeight], take: Take) -> int:
        """The mean over ranks of each rank's mean, added in the order of ranks."""
        self.module.train()
        ranks = sorted({rank for group in micro_batches for rank, _ in group})
        sums: dict[int, torch.Tensor] = {}
        for rank in ranks:
            own = [tokens for group in micro_batches for other, tokens in group if other == rank]

            def add(i: int, gradient: torch.Tensor) -> None:
                sums[i] = sums[i] + gradient if i in sums else gradient

            probe_gradients(self.module, own, weights, add)
        for i in reversed(range(len(weights))):
            take(i, sums[i] / len(ranks))
        return 0


def mean_of_ranks(losses: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Mean over ranks of each rank's mean over its micro-batches."""
    by_rank: dict[int, list[torch.Tensor]] = {}
    for rank, loss in losses:
        by_rank.setdefault(rank, []).append(loss)
    means = [sum(own, torch.zeros(())) / len(own) for own in by_rank.values()]
    return sum(means, torch.zeros(())) / len(means)


def groups_of(case: dict[str, Any], world: int) -> list[list[tuple[int, int]]]:
    """(micro-batch, rank) in the order in which this ZeRO stage adds gradients up.

    Stages 0 and 1 reduce once per update, so a rank's micro-batches are added first; stages 2 and 3 reduce
    every micro-batch.
    """
    micros, ranks = range(case.get("micro", 1)), range(world)
    if case["stage"] < 2:
        return [[(m, r) for m in micros] for r in ranks]
    return [[(m, r) for r in ranks] for m in micros]


def _overflows(method: Method, before: Any) -> bool:
    """Whether the last ``before_step`` switched more vectors of a matrix than its pool holds."""
    spare = getattr(method, "geometry", None)
    return spare is not None and bool(((method.switched - before) > spare.spare).any())


def train(model: BuiltModel, engine: Engine, method: Method, ctx: Context, shares: Any, evaluate: Any) -> Run:
    """STEPS updates on ``shares(step)``, then the loss of the first batch again."""
    losses, overflowed, calls = [], False, []
    model.module.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for step in range(STEPS):
        before = method.switched.copy() if hasattr(method, "switched") else None
        ctx.micro_batches = shares(step)
        method.before_step(step, ctx)
        overflowed |= _overflows(method, before)
        losses.append(float(engine.train_step(ctx.micro_batches, LR).loss))
    losses.append(float(evaluate(shares(0))))
    engine.end_evaluation()
    switched = int(method.switched.sum()) if hasattr(method, "switched") else 0
    return Run(losses, snapshot(model, engine, method), switched, overflowed, len(calls), method.counters())


def optimizer_of(case: dict[str, Any], model: BuiltModel) -> VectorClockAdamW:
    """As a run makes it: with ``decay`` in two groups, of which the norms' has none."""
    return make_optimizer(model.module, TrainConfig(lr=LR, weight_decay=case.get("decay", 0.0)))


def dense(case: dict[str, Any], world: int) -> Run:
    """The case on one process that does the work of ``world`` ranks."""
    low, order = case.get("bf16", False), groups_of(case, world)
    method, model = build(case["method"], low, case.get("flags", {}), family=case.get("family", "llama"))
    if low:
        model.module.bfloat16()
    engine = GroupedDenseEngine(model.module, model.layers, optimizer_of(case, model), case.get("clip", 0.0))
    ctx = context(model, engine, 0, 1)
    method.start(ctx)

    def shares(step: int) -> list[list[tuple[int, torch.Tensor]]]:
        return [[(rank, batch(step, micro).chunk(world)[rank]) for micro, rank in group] for group in order]

    def evaluate(groups: list[list[tuple[int, torch.Tensor]]]) -> torch.Tensor:
        return mean_of_ranks([(rank, engine.eval_step([tokens]).float()) for group in groups for rank, tokens in group])

    return train(model, engine, method, ctx, shares, evaluate)


def deepspeed_config(case: dict[str, Any], world: int) -> dict[str, Any]:
    zero = {"stage": case["stage"], "memory_efficient_linear": False, **case.get("zero", {})}
    return {
        "train_batch_size": 4 * case.get("micro", 1),
        "train_micro_batch_size_per_gpu": 4 // world,
        "gradient_accumulation_steps": case.get("micro", 1),
        "gradient_clipping": case.get("clip", 0.0),
        "bf16": {"enabled": case.get("bf16", False), "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def make_engine(case: dict[str, Any], model: BuiltModel, groups: Groups) -> ZeroEngine:
    settings = deepspeed_config(case, groups.data_size)
    return ZeroEngine(model.module, model.layers, optimizer_of(case, model), settings, groups)


def sharded(case: dict[str, Any], groups: Groups) -> Run:
    """The case under DeepSpeed. Collective."""
    method, model = build(
        case["method"], case.get("bf16", False), case.get("flags", {}), case.get("recompute", False),
        family=case.get("family", "llama"),
    )  # fmt: skip
    engine = make_engine(case, model, groups)
    ctx = context(model, engine, groups.data_rank, groups.data_size)
    method.start(ctx)

    def shares(step: int) -> list[torch.Tensor]:
        return [batch(step, m).chunk(groups.data_size)[groups.data_rank] for m in range(case.get("micro", 1))]

    def evaluate(own: list[torch.Tensor]) -> torch.Tensor:
        total = sum((engine.eval_step([tokens]).float() for tokens in own), torch.zeros(()))
        return mean_over(total.div_(len(own)), groups.data)

    run = train(model, engine, method, ctx, shares, evaluate)
    engine.close()
    gc.collect()
    return run


# ---------------------------------------------------------------- the comparison


def start_ranks() -> Groups:
    """Join the groups; what is alive now is taken out of the garbage collector's way."""
    initialize_distributed(None)
    groups = initialize_groups(ParallelConfig())
    gc.collect()
    gc.freeze()
    return groups


def difference(found: Run, expected: Run) -> dict[str, dict[str, float]]:
    """Per kind of tensor the largest absolute and the root mean square difference; NaN counts as infinite."""
    assert found.tensors.keys() == expected.tensors.keys()
    pairs = {"loss": [torch.tensor(found.losses) - torch.tensor(expected.losses)]}
    for name, tensor in found.tensors.items():
        reference = 0 if name == "gathered" else expected.tensors[name]
        pairs.setdefault(name.split("/")[0], []).append(tensor.double() - reference)
    report = {}
    for kind, parts in pairs.items():
        off = torch.nan_to_num(torch.cat(parts), nan=torch.inf)
        report[kind] = {"max": float(off.abs().max()) if off.numel() else 0.0, "rms": float(off.square().mean().sqrt())}
    return report


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far every case under DeepSpeed is from the dense run, and what happened in it."""
    groups, known, report = start_ranks(), {}, []
    for case in cases:
        found = sharded(case, groups)
        flags = {k: v for k, v in case.get("flags", {}).items() if k != "offload_candidates"}
        same = {"flags": flags, "order": groups_of(case, groups.data_size), "stage": 0, "zero": 0, "name": 0}
        key = json.dumps({**case, **same, "recompute": 0}, sort_keys=True)
        if key not in known:
            known[key] = dense(case, groups.data_size)
        expected = known[key]
        report.append({
            "worst": difference(found, expected),
            "learned": found.losses[0] - found.losses[-1],
            "switched": [found.switched, expected.switched],
            "overflowed": found.overflowed,
            "calls": found.calls,
            "counters": [found.counters, expected.counters],
            "idle": [n for n, t in found.tensors.items() if n.startswith("exp_avg/") and not t.any()],
            "pools": [float(t.double().abs().sum()) for n, t in found.tensors.items() if n.startswith("pool/")],
        })  # fmt: skip
    return report
