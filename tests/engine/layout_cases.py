"""Ranks of the layout table: the same run divided over ranks in some way, and on one dense, undivided process.

A case is a JSON object: ``method``, ``family``, ``layout`` (a key of LAYOUTS), ``bf16``, ``float64``, ``clip``,
``schedule`` and ``recompute``.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from megalowrank.checkpoint.shards import RunTensors
from megalowrank.config import ModelConfig, ParallelConfig, TrainConfig
from megalowrank.engine.dense import DenseEngine
from megalowrank.engine.engine import Engine
from megalowrank.engine.partial import NormOverRanks, PartialGradients
from megalowrank.engine.replicas import ReplicaCheck
from megalowrank.engine.setup import make_engine, make_optimizer
from megalowrank.engine.zero import host_allocator, initialize_distributed
from megalowrank.lowrank.factors import factor_places
from megalowrank.lowrank.state import Spread
from megalowrank.methods import method_class
from megalowrank.methods.base import Context, Method
from megalowrank.models.architecture import FAMILIES as KNOWN
from megalowrank.models.architecture import architecture, completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.models.projections import projections
from megalowrank.models.stages import split_layers
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.wire import partial_parameters
from tests.engine.equality_cases import METHODS as SHORT
from tests.engine.whole_runs import Run, difference, digest, logical, padding

STEPS, LR, SEED, LENGTH, MICRO, ROWS = 16, 3e-3, 3, 8, 2, 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 21, "num_attention_heads": 8,
              "num_query_groups": 4, "vocab_size": 29, "model_family": "llama"},
    "gpt2": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 22, "num_attention_heads": 4, "vocab_size": 29,
             "model_family": "gpt2"},
    "neox": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 23, "num_attention_heads": 4, "vocab_size": 30,
             "model_family": "neox", "rotary_percent": 0.5},
}  # fmt: skip
SHAPES = {
    **FAMILIES,
    # one case of it is enough: blocks like GPT-2's
    "opt": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 25, "num_attention_heads": 4, "vocab_size": 31,
            "model_family": "opt"},
}  # fmt: skip
SLOWER: dict[str, dict[str, Any]] = {
    "lora": {"lora_init": "switchlora"},
    "switchlora": {"switch_interval": 8, "switch_freeze_steps": 3},
    "relora": {"relora_interval": 4},
    "heterolora": {"hetero_interval": 7, "hetero_warmup_iters": 3, "hetero_score": "grad-norm"},
}
METHODS = {name: {**flags, **SLOWER.get(name, {})} for name, flags in SHORT.items()}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "tp4": {"tp": 4},
    "tp4 sp": {"tp": 4, "sp": True},
    "pp2": {"pp": 2, "stage": 1},
    "pp2 offload": {"pp": 2, "stage": 1, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "pp2 tp2": {"pp": 2, "tp": 2, "stage": 1},
    "pp2 tp2 sp": {"pp": 2, "tp": 2, "sp": True, "stage": 1},
    "pp2 dp2": {"pp": 2, "dp": 2, "stage": 1},
    **{f"tp2 dp2 zero{stage}": {"tp": 2, "dp": 2, "stage": stage} for stage in range(4)},
    **{f"tp2 sp dp2 zero{stage}": {"tp": 2, "dp": 2, "sp": True, "stage": stage} for stage in range(4)},
    **{f"dp2 zero{stage}": {"dp": 2, "stage": stage} for stage in (1, 2, 3)},
    **{f"tp2 dp2 zero{stage} offload": {"tp": 2, "dp": 2, "stage": stage,
                                        "zero": {"offload_optimizer": {"device": "cpu"}}} for stage in (1, 2, 3)},
}  # fmt: skip


def world_of(layout: str) -> int:
    """Ranks of a layout."""
    sizes = LAYOUTS[layout]
    return sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)


def batch(step: int) -> list[torch.Tensor]:
    """The global micro-batches of a step: MICRO times [ROWS, LENGTH + 1] tokens with something to learn in them."""
    source = torch.Generator().manual_seed(1000 + step)
    starts = torch.randint(0, 29, (MICRO, ROWS, 1), generator=source)
    noise = torch.randint(0, 2, (MICRO, ROWS, LENGTH + 1), generator=source)
    return list((starts + 5 * torch.arange(LENGTH + 1) + noise) % 29)


def build(
    case: dict[str, Any], place: Placement | None, sizes: dict[str, Any]
) -> tuple[Method, BuiltModel, ModelConfig]:
    kind = method_class(case["method"])
    method = kind(kind.config_class(**{**METHODS[case["method"]], **case.get("flags", {})}))
    config = completed(ModelConfig(**SHAPES[case["family"]]), KNOWN, LENGTH)
    config.check()
    if place is not None and place.blocks is not None:
        blocks = split_layers(config, method.adapters(), sizes["pp"])[place.blocks[0]]
        place = Placement(place.wire, blocks, place.begins, place.ends, place.ride)
    model = build_model(
        config, method, length=LENGTH, seed=SEED, recompute=case.get("recompute", False),
        dtype=torch.float64 if case.get("float64") else torch.float32,
        forward_dtype=torch.bfloat16 if case.get("bf16") else None, place=place,
    )  # fmt: skip
    return method, model, config


def train_config(case: dict[str, Any]) -> TrainConfig:
    """A large epsilon, so that an element whose gradient is all rounding does not move by a whole learning rate."""
    return TrainConfig(lr=LR, weight_decay=0.1, adam_eps=1e-4)


class Poison:
    """Makes a gradient infinite in some attempts, where this rank holds the first block and is told to."""

    def __init__(self, case: dict[str, Any], model: BuiltModel, here: bool) -> None:
        self.attempts, self.armed = case.get("poison", []), False
        if self.attempts and here and model.module.place.begins:
            model.module.layers[0].input_layernorm.weight.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled[-1] += torch.inf if self.armed else 0.0
        return spoiled


def train(
    engine: Engine, method: Method, ctx: Context, shares: Any, poison: Poison, first: int = 0, last: int = STEPS
) -> tuple[list[float], ...]:
    """Losses and gradient norms of the updates first .. last - 1; attempts that were not applied are taken again.

    After the very last update the loss of an evaluation comes too.
    """
    losses: list[float] = []
    norms: list[float] = []
    attempts, announced = first, -1
    while len(norms) < last - first:
        if announced != first + len(norms):
            announced = first + len(norms)
            ctx.micro_batches = shares(attempts)
            method.before_step(announced, ctx)
        else:
            ctx.micro_batches = shares(attempts)
            method.retry(announced, ctx)
        poison.armed = attempts in poison.attempts
        result = engine.train_step(shares(attempts), LR)
        attempts += 1
        if result.applied:
            losses.append(float(result.loss))
            norms.append(float(result.grad_norm))
    if last == STEPS:
        losses.append(float(engine.eval_step(shares(0))))
        engine.end_evaluation()
    return losses, norms, [attempts]


def alone() -> Groups:
    """The groups of a process that communicates with nobody."""
    one = {name: None for name in ("data", "tensor", "pipe", "model", "stage", "everyone")}
    ranks = {f"{name}_{kind}": kind == "size" for name in ("data", "tensor", "pipe") for kind in ("rank", "size")}
    return Groups(**one, **{name: int(value) for name, value in ranks.items()}, rank=0, world=1)


def dense(case: dict[str, Any]) -> Run:
    """The case on one process."""
    method, model, _ = build(case, None, {})
    if case.get("bf16"):
        model.module.bfloat16()
    engine = DenseEngine(
        model.module, model.layers, make_optimizer(model.module, train_config(case)), case.get("clip", 0.0)
    )
    ctx = Context(
        model.layers, engine.state, SEED, STEPS, 0, 1, host_allocator(False), engine=engine, names=model.names
    )
    method.start(ctx)
    tensors = RunTensors(model, engine.state, method, alone())
    start = digest(logical(tensors, 1))
    losses, norms, attempts = train(engine, method, ctx, batch, Poison(case, model, True))
    counters = {**method.counters(), "attempts": attempts[0]}
    return Run(losses, norms, logical(tensors, 1), counters, start)


@dataclass
class Divided:
    """A run divided over ranks, before its first update."""

    method: Method
    model: BuiltModel
    engine: Any
    groups: Groups
    ctx: Context
    tied: bool

    @classmethod
    def start(cls, case: dict[str, Any]) -> Divided:
        """Build it. Collective."""
        sizes = {"tp": 1, "pp": 1, "dp": 1, "stage": 0, **LAYOUTS[case["layout"]]}
        groups = initialize_groups(
            ParallelConfig(
                tensor_model_parallel_size=sizes["tp"], pipeline_model_parallel_size=sizes["pp"],
                sequence_parallel=sizes.get("sp", False),
            )
        )  # fmt: skip
        rides = dict.fromkeys(projections(ModelConfig(**SHAPES[case["family"]])), case.get("schedule") != "partial")
        last = groups.pipe_rank == groups.pipe_size - 1
        place = Placement(groups.wire(), (groups.pipe_rank, 0), groups.pipe_rank == 0, last, rides)
        method, model, config = build(case, place, sizes)
        make = exact_engine if case.get("float64") else make_engine
        engine = make(model, config, train_config(case), deepspeed_config(case, sizes), groups)
        ctx = Context(
            model.layers, engine.state, SEED, STEPS, groups.data_rank, groups.data_size, host_allocator(False),
            engine=engine, names=model.names,
        )  # fmt: skip
        method.start(ctx)
        return cls(method, model, engine, groups, ctx, architecture(config).tied_output)

    def shares(self, step: int) -> list[torch.Tensor]:
        """The micro-batches of this rank."""
        return [tokens.chunk(self.groups.data_size)[self.groups.data_rank] for tokens in batch(step)]

    def train(self, case: dict[str, Any], first: int = 0, last: int = STEPS) -> tuple[list[float], ...]:
        """``train`` on this rank; the loss of the evaluation is that of all. Collective."""
        groups = self.groups
        poison = Poison(case, self.model, groups.data_rank == groups.data_size - 1 and groups.tensor_rank == 0)
        losses, norms, attempts = train(self.engine, self.method, self.ctx, self.shares, poison, first, last)
        if groups.pipe_size == 1 and last == STEPS:
            total = torch.tensor(losses[-1], dtype=torch.float64)
            dist.all_reduce(total, group=groups.data)
            losses[-1] = float(total) / groups.data_size
        return losses, norms, attempts


def divided(case: dict[str, Any]) -> Run:
    """The case on this job's ranks. Collective."""
    run = Divided.start(case)
    groups = run.groups
    tensors = RunTensors(run.model, run.engine.state, run.method, groups)
    start = digest(logical(tensors, groups.world))

    losses, norms, attempts = run.train(case)
    counters = {**run.method.counters(), "attempts": attempts[0]}
    ReplicaCheck(1, run.model, run.engine, groups, run.tied).run(STEPS)
    found = Run(losses, norms, logical(tensors, groups.world), counters, start, padding(tensors))
    if not case.get("float64"):
        run.engine.close()
    gc.collect()
    return found


def exact_engine(
    model: BuiltModel, config: ModelConfig, train: TrainConfig, deepspeed: dict[str, Any], groups: Groups
) -> DenseEngine:
    """An engine in float64, which DeepSpeed does not have: tensor parallelism alone."""
    assert groups.data_size == groups.pipe_size == 1
    spread = Spread(factor_places(model.layers, groups.tensor_rank), groups.tensor)
    clip = deepspeed["gradient_clipping"]
    engine = DenseEngine(model.module, model.layers, make_optimizer(model.module, train), clip, spread)
    engine.optimizer.norm_over = NormOverRanks(groups.tensor)
    engine.partial = PartialGradients(partial_parameters(model.module), groups.tensor, MICRO, per_update=True)
    return engine


def deepspeed_config(case: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_batch_size": ROWS * MICRO,
        "train_micro_batch_size_per_gpu": ROWS // sizes["dp"],
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": case.get("clip", 0.0),
        "bf16": {"enabled": case.get("bf16", False), "check_grad_overflow": True},
        "zero_optimization": {"stage": sizes["stage"], "memory_efficient_linear": False, **sizes.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def drop_groups() -> None:
    """Destroy all groups but the world and the one that DeepSpeed keeps; threads of hundreds would slow everything."""
    parallel_state.destroy_model_parallel()
    kept = (dist.group.WORLD, deepspeed_groups._WORLD_GROUP)
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in kept:
            dist.destroy_process_group(group)
    gc.collect()


def name_of(case: dict[str, Any]) -> str:
    """What the table calls a case."""
    more = [key for key in ("float64", "bf16", "clip", "recompute", "poison", "flags") if case.get(key)] + [
        case.get("schedule", "")
    ]
    return ", ".join((case["method"], case["layout"], case["family"], *filter(None, more)))


def key_of(case: dict[str, Any]) -> str:
    """The reference a case is compared with: what does not depend on the layout."""
    kept = {k: v for k, v in sorted(case.items()) if k not in ("layout", "schedule", "recompute", "name")}
    return json.dumps(kept).translate(str.maketrans('{}":, ', "______"))


def references(cases: list[dict[str, Any]], folder: Path) -> Iterator[Run]:
    """The dense run of every case; each is made once, by one rank, and read by all."""
    keys = {key_of(case): case for case in cases}
    for at, (key, case) in enumerate(keys.items()):
        if at % dist.get_world_size() == dist.get_rank():
            run = dense(case)
            save_file(run.tensors, folder / f"{key}.safetensors")
            rest = {**asdict(run), "tensors": None}
            (folder / f"{key}.json").write_text(json.dumps(rest))
    dist.barrier()
    for case in cases:
        rest = json.loads((folder / f"{key_of(case)}.json").read_text())
        yield Run(**{**rest, "tensors": load_file(folder / f"{key_of(case)}.safetensors")})


def compare(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences, and what happened in the run, for each case."""
    initialize_distributed(None)
    initialize_groups(ParallelConfig())
    gc.collect()
    gc.freeze()
    found = []
    for case, expected in zip(payload["cases"], references(payload["cases"], Path(payload["folder"])), strict=True):
        run = divided(case)
        drop_groups()
        report = {
            "name": name_of(case),
            "worst": difference(run, expected),
            "starts": [run.start, expected.start],
            "padding": run.padding,
            "counters": [run.counters, expected.counters],
            "learned": expected.losses[0] - expected.losses[-1],
            "idle": [n for n, t in run.tensors.items() if n.startswith("exp_avg/") and not t.any()],
        }
        found.append(report)
        if payload.get("verbose") and dist.get_rank() == 0:
            print(case, {k: f"{v:.1e}" for k, v in report["worst"].items()}, flush=True)
    return found
