"""From a command line to a finished run: the one place where all parts meet."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megalowrank import __version__, signals
from megalowrank.checkpoint.shards import RunTensors
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.cli import RunConfig, parse
from megalowrank.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megalowrank.data.ahead import BatchesAhead
from megalowrank.data.labelled import LabelledData
from megalowrank.engine import dsconfig
from megalowrank.engine.corpus import Corpus, open_corpus, tokenizer_size
from megalowrank.engine.evaluation import EVAL_INTERVAL, Evaluation, HeldOutLoss, TaskMeasures
from megalowrank.engine.guard import Guard
from megalowrank.engine.instruments import Instruments
from megalowrank.engine.layouts import check_layout
from megalowrank.engine.loop import Loop, Position
from megalowrank.engine.metrics import Progress, replace_text
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.pipeline import PipelineEngine
from megalowrank.engine.plan import layout_of
from megalowrank.engine.replicas import ReplicaCheck
from megalowrank.engine.report import Report
from megalowrank.engine.resume import RunState, starting_point
from megalowrank.engine.saving import Saver
from megalowrank.engine.schedule import restart_warnings, with_restarts
from megalowrank.engine.task import check_trained, load_task, with_epochs, with_outputs
from megalowrank.engine.trackers import open_trackers
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.errors import ConfigError
from megalowrank.methods import METHODS
from megalowrank.methods.base import Context, Method
from megalowrank.models.accounting.layout import stage_blocks
from megalowrank.models.architecture import LLAMA_FAMILIES, architecture, check_tensor_parallel
from megalowrank.models.build import BuiltModel
from megalowrank.models.presets import apply_preset
from megalowrank.models.transformer import Placement
from megalowrank.parallel.groups import Groups, data_parallel_size, initialize_groups
from megalowrank.parallel.heads import check_heads
from megalowrank.parallel.launch import set_rank_environment
from megalowrank.parallel.requests import Requests, host_group

Builder = Callable[..., BuiltModel]
_STARTED = time.monotonic()


def pretrain(argv: Sequence[str], build: Builder, program: str, families: Sequence[str] = LLAMA_FAMILIES) -> None:
    """Run one pre-training job on this rank; every rank of the job calls it with the same ``argv``.

    ``build`` makes models of ``families``, of which the first is the default. Raises ConfigError before
    anything is written.
    """
    config = parse(argv, {name: method.config_class for name, method in METHODS.items()}, program)
    _, world, _ = set_rank_environment()
    data = load_task(config)
    shape, vocabulary = with_outputs(config.model, data), tokenizer_size(config.data)
    model_config = apply_preset(shape, vocabulary, config.train.seq_length, families)
    resolved, method = resolve_run(config, model_config, world, data)
    corpus = open_corpus(config.data, resolved.train, model_config.vocab_size or 0, resolved.global_batch_size, data)
    heads = initialize_distributed(_timeout(config), method.replica_groups())
    groups = initialize_groups(config.parallel, heads)
    method.head = groups.head
    with Guard(config.parallel.hang_timeout, output_folder(config), groups) as guard:
        _train(build, config, model_config, resolved, method, corpus, groups, guard.watchdog.beat)


def _train(
    build: Builder,
    config: RunConfig,
    model_config: ModelConfig,
    resolved: dsconfig.Resolved,
    method: Method,
    corpus: Corpus,
    groups: Groups,
    beat: Callable[[str], None],
) -> None:
    """Build, resume, train and report; every rank calls it."""
    rank, train = groups.rank, resolved.train
    source, weights = starting_point(config.output, groups)
    if weights is not None and corpus.task is not None and weights.leave_heads(corpus.task.labels):
        config.notes.append(f"the head of the task {corpus.task.name} is new, that of --load is not read")
    place = placement(config.parallel, model_config, resolved, method, groups)
    model = build_model(build, model_config, train, method, place, weights, groups.pipe)
    model.warnings += restart_warnings(train, method.restart_interval())
    engine = make_engine(model, model_config, train, resolved.deepspeed, groups)
    ctx = context_of(model, engine, resolved, groups, beat)
    method.start(ctx)
    run = describe(config, model_config, resolved, corpus, groups)
    state = RunState(engine, method, RunTensors(model, engine.state, method, groups), groups, run)
    beat("the beginning of loading")
    position = state.load(source)
    report = Report(model_config, train, model, engine, method, resolved, groups)
    tied = architecture(model_config).tied_output
    check = ReplicaCheck(config.parallel.replica_check_interval, model, engine, groups, tied)
    saver = Saver(state, config.output, host_group(_timeout(config), groups.heads))
    requests = requests_of(saver, groups, _timeout(config), train.exit_duration_in_mins)
    loop = assemble(config, resolved, corpus, ctx, method, engine, report, check, position, run, saver, requests, beat)
    say(rank, "\n".join([*config.notes, report.start(corpus, position)]))
    if position.step >= train.train_iters:
        say(rank, f"nothing to train: --train-iters {train.train_iters} are done")
    if config.diagnostics.dry_run:
        loop.close()
        say(rank, "dry run: nothing was trained and nothing was written")
    else:
        with saver.alone(), contextlib.closing(loop):
            if rank == 0:
                write_run(output_folder(config), run)
            loop.metrics.truncate_from(position.step + 1)
            evaluation = loop.run()
        signals.ignore()
        say(rank, "\n".join([report.end(evaluation, corpus), *loop.instruments.summary()]))
    engine.close()


def _timeout(config: RunConfig) -> timedelta:
    return timedelta(minutes=config.parallel.distributed_timeout_minutes)


def context_of(
    model: BuiltModel,
    engine: ZeroEngine | PipelineEngine,
    resolved: dsconfig.Resolved,
    groups: Groups,
    beat: Callable[[str], None],
) -> Context:
    """What the method may touch."""
    train, allocate = resolved.train, host_allocator(resolved.pin_host_memory)
    return Context(
        model.layers, engine.state, train.seed, train.train_iters, groups.data_rank, groups.data_size, allocate,
        train.lr_restart_offset, engine, heads=groups.heads, names=model.names, beat=beat,
    )  # fmt: skip


def requests_of(saver: Saver, groups: Groups, timeout: timedelta, minutes: int | None) -> Requests:
    """What ranks may ask of all: to stop, because of a signal; to save or stop, by the clock of the first; to give up.

    ``minutes`` is how long the process may take; None: as long as it takes.
    """
    rank, limit = groups.rank, math.inf
    if minutes is not None and rank == 0:
        limit = _STARTED + 60.0 * minutes
    sources: dict[str, Callable[[], bool]] = {
        "stop": lambda: bool(signals.received()) or time.monotonic() >= limit,
        "save": lambda: rank == 0 and saver.overdue(),
        "failed": lambda: saver.failed,
    }
    return Requests(host_group(timeout, groups.heads), sources, frozenset({"stop"}), groups.heads)


def resolve_run(
    config: RunConfig, model: ModelConfig, world: int, data: LabelledData | None = None
) -> tuple[dsconfig.Resolved, Method]:
    """What runs on ``world`` ranks, from flags and DeepSpeed JSON; ConfigError for what is not supported.

    ``data`` are those of a labelled task.
    """
    if config.ds_config is None:
        raise ConfigError(
            "--ds-config is missing", None, "a DeepSpeed JSON, for instance ds_configs/zero2_offload.json"
        )
    method = METHODS[config.train.method](config.method_config)
    heads = method.replica_groups()
    check_heads(heads, world)
    ranks = heads * data_parallel_size(config.parallel, world // heads)
    resolved = dsconfig.resolve(config.ds_config, config.train, config.given, ranks, model.hidden_size or 0, heads)
    check_trained(method, data)
    resolved = with_epochs(resolved, data, config.given)
    check_layout(config.parallel, model, resolved.train, resolved.deepspeed["zero_optimization"])
    check_tensor_parallel(model, config.parallel.tensor_model_parallel_size)
    if resolved.train.fold_residual != TrainConfig.fold_residual and not resolved.train.bf16:
        raise ConfigError("--fold-residual has no effect without bf16", resolved.train.fold_residual)
    method.check_run(resolved.micro_batch_size, resolved.train, config.parallel)
    train = with_restarts(resolved.train, method.restart_interval())
    return dataclasses.replace(resolved, train=train), method


def say(rank: int, text: str) -> None:
    """Print on the first rank."""
    if rank == 0:
        print(text, flush=True)


def build_model(
    build: Builder,
    config: ModelConfig,
    train: TrainConfig,
    method: Method,
    place: Placement | None = None,
    saved: SavedWeights | None = None,
    stages: Any = None,
) -> BuiltModel:
    """This rank's place of the initialised model (default: all of it), in float32, on the CPU.

    ``stages`` is the group of the ranks that build the other stages.

    Its weights are those of ``saved``, if given; ConfigError if they are of another model.
    """
    model = build(
        config,
        method,
        length=train.seq_length,
        seed=train.seed,
        recompute=train.recompute_granularity == "full",
        forward_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        fold_residual=train.fold_residual,
        initial=None if saved is None else saved.initial,
        place=place,
    )
    if saved is not None:
        saved.check_covered({tensor.name for tensor in model.tensors}, stages)
    return model


def placement(
    parallel: ParallelConfig, config: ModelConfig, resolved: dsconfig.Resolved, method: Method, groups: Groups
) -> Placement:
    """The part of the model that this rank builds; every rank decides alike for all."""
    layout = layout_of(config, parallel, resolved, method, groups.data_size)
    blocks = stage_blocks(config, method.adapters(), layout, groups.pipe_rank)
    return Placement(
        wire=groups.wire(),
        blocks=(blocks.start, blocks.stop),
        begins=groups.pipe_rank == 0,
        ends=groups.pipe_rank == groups.pipe_size - 1,
        ride={name: layout.rides(name) for name in layout.schedules},
    )


def make_engine(
    model: BuiltModel, config: ModelConfig, train: TrainConfig, deepspeed: dict[str, Any], groups: Groups
) -> ZeroEngine | PipelineEngine:
    """The engine of the layout; every rank of the job calls it."""
    optimizer = make_optimizer(model.module, train)
    if groups.pipe_size == 1:
        return ZeroEngine(model.module, model.layers, optimizer, deepspeed, groups)
    tied = architecture(config).tied_output
    return PipelineEngine(model.module, model.layers, optimizer, deepspeed, groups, tied)


def make_optimizer(module: torch.nn.Module, train: TrainConfig) -> VectorClockAdamW:
    """AdamW over all trained tensors; vectors (norms) are not decayed, as in Megatron."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": train.weight_decay}]
    if train.weight_decay:
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    return VectorClockAdamW(groups, train.lr or 0.0, (train.adam_beta1, train.adam_beta2), train.adam_eps)


def assemble(
    config: RunConfig,
    resolved: dsconfig.Resolved,
    corpus: Corpus,
    ctx: Context,
    method: Method,
    engine: ZeroEngine | PipelineEngine,
    report: Report,
    check: ReplicaCheck,
    position: Position,
    run: dict[str, Any],
    saver: Saver,
    requests: Requests,
    beat: Callable[[str], None],
) -> Loop:
    """The loop of this rank."""
    folder, main = output_folder(config), report.groups.rank == 0
    batches = BatchesAhead(corpus.train, resolved.micro_batch_size, resolved.accumulation, *report.groups.stream)
    return Loop(
        engine=engine,
        method=method,
        ctx=ctx,
        train=resolved.train,
        output=config.output,
        lr=resolved.train.lr or 0.0,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.accumulation,
        batches=batches,
        evaluation=evaluation_of(config.data, resolved, corpus, engine, report),
        metrics=open_trackers(folder, config.output, main, run),
        progress=Progress(resolved.train.train_iters, position.step, main),
        instruments=Instruments(config.diagnostics, folder, report.groups, engine.device),
        memory=report.current_memory,
        saver=saver,
        requests=requests,
        beat=beat,
        check=check,
        ranks=report.groups.world,
        flops_per_token=report.flops_per_token,
        peak_flops=report.peak_flops,
        position=position,
    )


def evaluation_of(
    data: DataConfig, resolved: dsconfig.Resolved, corpus: Corpus, engine: ZeroEngine | PipelineEngine, report: Report
) -> Evaluation:
    """What is evaluated, and when."""
    groups = report.groups
    run = engine, resolved.micro_batch_size, resolved.accumulation, groups.stream
    if corpus.task is None:
        interval = EVAL_INTERVAL if data.eval_interval is None else data.eval_interval
        return HeldOutLoss(corpus.valid, data.eval_iters, interval, corpus.bytes_per_token, *run)
    head = report.model.module.output
    return TaskMeasures(corpus.task, head, data.eval_interval, resolved.global_batch_size, groups, *run)


def output_folder(config: RunConfig) -> Path | None:
    """Where metrics and the resolved configuration go."""
    chosen = config.output.output_dir or config.output.save
    return None if chosen is None else Path(chosen)


def describe(
    config: RunConfig, model: ModelConfig, resolved: dsconfig.Resolved, corpus: Corpus, groups: Groups
) -> dict[str, Any]:
    """The resolved run as JSON values."""
    train = dataclasses.replace(
        resolved.train,
        micro_batch_size=resolved.micro_batch_size,
        global_batch_size=resolved.global_batch_size,
    )
    known = {"unigram_loss": corpus.unigram_loss, "bytes_per_token": corpus.bytes_per_token}
    return {
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(train),
        "parallel": dataclasses.asdict(config.parallel),
        "data": dataclasses.asdict(config.data),
        "output": dataclasses.asdict(config.output),
        "method": train.method,
        "method_config": dataclasses.asdict(config.method_config),
        "deepspeed": resolved.deepspeed,
        "world_size": groups.world,
        **({} if corpus.task is None else {"labels": corpus.task.labels}),
        **{key: value for key, value in known.items() if value is not None},
        "versions": {"megalowrank": __version__, "torch": str(torch.__version__)},
    }


def write_run(folder: Path | None, run: dict[str, Any]) -> None:
    """Write ``run.json`` beside the output."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot write the output folder", f"{folder}: {error.strerror}") from None
    replace_text(folder / "run.json", json.dumps(run, indent=1) + "\n")
