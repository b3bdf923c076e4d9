"""Ranks that train apart in heads, compared with the same heads on one dense process.

A case is a JSON object: ``heads``, ``layout`` (tp, pp, dp, sp and stage inside a head), ``flags`` of the method,
``bf16``, ``clip``, ``cuts`` (updates after which the run is saved, built anew and resumed) and ``folder``.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.shards import RunTensors
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.checkpoint.write import save_checkpoint
from megalowrank.config import ModelConfig, OutputConfig, ParallelConfig, TrainConfig
from megalowrank.engine.loop import Position
from megalowrank.engine.replicas import ReplicaCheck
from megalowrank.engine.resume import GroupRanks, RunState
from megalowrank.engine.setup import make_engine
from megalowrank.engine.zero import host_allocator, initialize_distributed
from megalowrank.errors import TrainingError
from megalowrank.lowrank.fold import join_residual
from megalowrank.methods.base import Context
from megalowrank.methods.full_rank import FullRank
from megalowrank.methods.lte import LTE
from megalowrank.models.architecture import FAMILIES as KNOWN
from megalowrank.models.architecture import completed
from megalowrank.models.build import BuiltModel, build_model
from megalowrank.models.transformer import Placement, Transformer
from megalowrank.parallel.collectives import mean_over
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.heads import Heads, join_heads
from tests.engine.head_reference import LR, STEPS, model_of, reference, train_config
from tests.engine.layout_cases import FAMILIES, LENGTH, MICRO, ROWS, SEED, batch, drop_groups
from tests.engine.resume_cases import save_now
from tests.engine.whole_runs import Tensors, digest


def join(payload: dict[str, Any]) -> Heads:
    """Leave the harness's world for that of a head. Collective; once in a process."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{payload['folder']}/heads", int(os.environ["WORLD_SIZE"]))
    heads = join_heads(payload["heads"], "gloo", timedelta(seconds=payload.get("timeout", 60)), store)
    initialize_distributed(None)
    return heads


@dataclass
class Headed:
    """A run in heads on this rank."""

    case: dict[str, Any]
    method: LTE
    model: BuiltModel
    engine: Any
    groups: Groups
    ctx: Context
    tensors: RunTensors

    @classmethod
    def start(cls, case: dict[str, Any], heads: Heads | None) -> Headed:
        """Build it. Collective."""
        sizes = {"tp": 1, "pp": 1, "dp": 1, "stage": 0, **case.get("layout", {})}
        parallel = ParallelConfig(sizes["tp"], sizes["pp"], sizes.get("sp", False))
        groups = initialize_groups(parallel, heads)
        last = groups.pipe_rank == groups.pipe_size - 1
        place = Placement(groups.wire(), begins=groups.pipe_rank == 0, ends=last)
        method, model = model_of(case, groups.head, place, sizes["pp"])
        settings = deepspeed_config(case, sizes)
        engine = make_engine(model, ModelConfig(**FAMILIES["llama"]), train_config(), settings, groups)
        ctx = Context(
            model.layers, engine.state, SEED, STEPS, groups.data_rank, groups.data_size, host_allocator(False),
            engine=engine, heads=heads,
        )  # fmt: skip
        method.start(ctx)
        return cls(case, method, model, engine, groups, ctx, RunTensors(model, engine.state, method, groups))

    def shares(self, step: int) -> list[torch.Tensor]:
        """The micro-batches of this rank."""
        rank, ranks = self.groups.stream
        return [tokens.chunk(ranks)[rank] for tokens in batch(step)]

    def train(self, first: int, last: int) -> list[float]:
        """Losses of updates first .. last - 1, means over heads."""
        losses = []
        for step in range(first, last):
            self.method.before_step(step, self.ctx)
            losses.append(self._mean(float(self.engine.train_step(self.shares(step), LR).loss)))
        return losses

    def evaluate(self) -> float:
        """As the loop does it."""
        self.method.settle(self.ctx)
        loss = mean_over(self.engine.eval_step(self.shares(0)), self.groups.data)
        self.engine.end_evaluation()
        self.method.unsettle(self.ctx)
        return self._mean(float(loss))

    def _mean(self, value: float) -> float:
        return value if self.ctx.heads is None else self.ctx.heads.mean(value, "a loss")

    def pieces(self) -> Tensors:
        """What this rank writes into a checkpoint."""
        return {f"{piece.name}#{i}": piece.tensor.double() for i, piece in enumerate(self.tensors.pieces())}

    def end(self) -> None:
        self.engine.close()
        gc.collect()


def deepspeed_config(case: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_batch_size": ROWS * MICRO // case["heads"],
        "train_micro_batch_size_per_gpu": ROWS // case["heads"] // sizes["dp"],
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": case.get("clip", 0.0),
        "bf16": {"enabled": case.get("bf16", False), "check_grad_overflow": True},
        "zero_optimization": {"stage": sizes["stage"], "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def save(run: Headed, folder: Path, step: int) -> None:
    """Write a checkpoint. Collective."""
    ranks = GroupRanks(run.groups.everyone, run.groups.rank, run.groups.world)
    save_checkpoint(folder, step, run.tensors.pieces(), {"step": step}, ranks)


def saved(folder: Path) -> Tensors:
    """All tensors of a checkpoint, whole; weights with their residuals in them."""
    checkpoint = Checkpoint.open(folder)
    found = {name: checkpoint.read(name).view(checkpoint.shape(name)) for name in checkpoint.names()}
    for name in [name for name in found if name.startswith("residual/")]:
        weight = name.replace("residual/", "weight/")
        found[weight] = join_residual(found[weight], found.pop(name))
    return {name: tensor.double().flatten() for name, tensor in found.items()}


def difference(found: Tensors, expected: Tensors) -> dict[str, float]:
    """The largest absolute difference per kind of tensor."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    report: dict[str, float] = {}
    for name, tensor in found.items():
        kind = name.removeprefix("head").lstrip("0123456789").removeprefix("/").split("/")[0]
        off = torch.nan_to_num(tensor - expected[name], nan=torch.inf).abs().max()
        report[kind] = max(report.get(kind, 0.0), float(off))
    return report


def compare(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """How far every case is from its reference, and what else must hold in it. Collective."""
    found = []
    heads = join(payload)
    expected = references(payload["cases"], heads)
    for number, case in enumerate(payload["cases"]):
        folder = Path(payload["folder"]) / f"case{number}"
        run = Headed.start(case, heads)
        losses = run.train(0, STEPS)
        before = digest(run.pieces())
        evaluation, again = run.evaluate(), run.evaluate()
        report = {
            "untouched": digest(run.pieces()) == before,
            "evaluations": [evaluation, again],
            "counters": run.method.counters(),
            "losses": losses,
        }
        check = ReplicaCheck(1, run.model, run.engine, run.groups, False)
        check.run(STEPS)
        save(run, folder, STEPS)
        report["flipped"] = flipped(run, check)
        if run.groups.rank == 0:
            whole = expected[key_of(case)]
            report["worst"] = difference(saved(folder), whole["tensors"])
            report["expected"] = whole["losses"], whole["evaluated"]
        run.end()
        drop_groups()
        found.append(report)
    return found


def key_of(case: dict[str, Any]) -> str:
    """What a reference depends on."""
    return json.dumps({key: value for key, value in case.items() if key != "layout"}, sort_keys=True)


def references(cases: list[dict[str, Any]], heads: Heads) -> dict[str, dict[str, Any]]:
    """The reference of every case, on the first rank; before anything is divided. Collective."""
    initialize_groups(ParallelConfig(), heads)
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        case["heads"] = heads.count
        if heads.job_rank == 0 and key_of(case) not in found:
            found[key_of(case)] = reference(case)
    return found


def flipped(run: Headed, check: ReplicaCheck) -> str:
    """What the replica check says when one bit of a weight of the last rank is another."""
    weight = run.model.layers[0].weight
    if run.groups.rank == run.groups.world - 1:
        bits = weight.locate().flat.view(torch.int16 if run.case.get("bf16") else torch.int32)
        bits[3] ^= 1
    try:
        check.run(STEPS)
    except TrainingError as error:
        return str(error)
    return "nothing was found"


# ---------------------------------------------------------------- resuming


def state_of(run: Headed) -> RunState:
    train = TrainConfig(method="lte", seed=SEED, seq_length=LENGTH, global_batch_size=ROWS * MICRO)
    low = run.case.get("bf16", False)
    described = {"model": FAMILIES["llama"], "train": {**asdict(train), "bf16": low},
                 "method": "lte", "method_config": asdict(run.method.config)}  # fmt: skip
    return RunState(run.engine, run.method, run.tensors, run.groups, described)


def resume(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case without a break, and with a new process after the updates of ``cuts``. Collective."""
    heads, found = join(payload), []
    for number, case in enumerate(payload["cases"]):
        case["heads"], folder = heads.count, Path(payload["folder"]) / f"resumed{number}"
        run = Headed.start(case, heads)
        expected = run.train(0, STEPS), digest(run.pieces())
        run.end()
        drop_groups()
        losses, at = [], Position()
        run = Headed.start(case, heads)
        for cut in case["cuts"]:
            losses += run.train(at.step, cut)
            save_now(state_of(run), folder, Position(cut, cut + heads.head))
            run.end()
            drop_groups()
            run = Headed.start(case, heads)
            spoil(run)
            at = state_of(run).load(OutputConfig(load=str(folder)))
        losses += run.train(at.step, STEPS)
        found.append({
            "same": (losses, digest(run.pieces())) == expected, "attempts": at.attempts - at.step,
            "merges": run.method.counters()["merges"],
        })  # fmt: skip
        run.end()
        drop_groups()
    return found


def spoil(run: Headed) -> None:
    """Overwrite everything that a load must bring back."""
    tensors = run.tensors
    held = (*tensors._weight_parts(), *tensors._fixed_parts())
    for part in (*tensors._optimizer_parts(), *(part for part, _ in held)):
        part.fill(torch.full_like(part.values(), torch.nan if part.storage.is_floating_point() else 77))


def other_number(payload: dict[str, Any]) -> dict[str, Any]:
    """Go on from a checkpoint of another number of heads; what this run starts from. Collective."""
    heads = join(payload)
    run = Headed.start({"heads": heads.count, **payload.get("case", {})}, heads)
    if "load" in payload:
        state_of(run).load(OutputConfig(load=payload["load"]))
    else:
        run.train(0, 5)
    found = {"evaluated": run.evaluate(), "updates": run.engine.state.updates}
    save_now(state_of(run), payload["save"], Position(5, 5))
    run.end()
    return found


# ---------------------------------------------------------------- reading


def plain_model(saved: SavedWeights) -> Transformer:
    """A model without factors, with the weights of a checkpoint."""
    config = completed(ModelConfig(**FAMILIES["llama"]), KNOWN, LENGTH)
    return build_model(config, FullRank(None), length=LENGTH, seed=0, initial=saved.read).module


@torch.no_grad()
def loss_of(model: Transformer) -> float:
    """Of the first batch."""
    model.eval()
    return float(torch.stack([model(tokens) for tokens in batch(0)]).mean())


def skip_alone(payload: dict[str, Any]) -> str:
    """What is said when one head skips an update and what heads share was to be trained alike. Collective."""
    heads = join(payload)
    case = {"heads": heads.count, "layout": {"stage": 1}, "flags": {"lte_plain": "synchronous"}}
    run = Headed.start(case, heads)
    if heads.head == 1:
        run.model.layers[2].Bt.register_hook(lambda gradient: gradient + torch.inf)
    result = run.engine.train_step(run.shares(0), LR)
    try:
        run.method.after_attempt(result.applied, run.ctx)
    except TrainingError as error:
        return f"{result.applied} {error}"
    finally:
        run.end()
    return "nothing was said"
