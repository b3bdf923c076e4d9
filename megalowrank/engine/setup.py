"""From a command line to a finished run: the one place where all parts meet."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megalowrank import __version__
from megalowrank.checkpoint.shards import RunTensors
from megalowrank.cli import RunConfig, parse
from megalowrank.config import ModelConfig, TrainConfig
from megalowrank.engine import dsconfig
from megalowrank.engine.corpus import Corpus, open_corpus, tokenizer_size
from megalowrank.engine.loop import Loop, Position
from megalowrank.engine.metrics import MetricsWriter, Progress
from megalowrank.engine.optimizer import VectorClockAdamW
from megalowrank.engine.report import Report
from megalowrank.engine.resume import RunState
from megalowrank.engine.schedule import with_restarts
from megalowrank.engine.zero import ZeroEngine, host_allocator, initialize_distributed
from megalowrank.errors import ConfigError
from megalowrank.methods import METHODS
from megalowrank.methods.base import Context, Method
from megalowrank.models.build import BuiltModel
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import Groups, initialize_groups
from megalowrank.parallel.launch import set_rank_environment

Builder = Callable[..., BuiltModel]


def pretrain(argv: Sequence[str], build: Builder, program: str) -> None:
    """Run one pre-training job on this rank; every rank of the job calls it with the same ``argv``.

    ``build`` makes the model of the family. Raises ConfigError before anything is written.
    """
    config = parse(argv, {name: method.config_class for name, method in METHODS.items()}, program)
    rank, world, _ = set_rank_environment()
    model_config = apply_preset(config.model, tokenizer_size(config.data))
    if config.ds_config is None:
        raise ConfigError(
            "--ds-config is missing", None, "a DeepSpeed JSON, for instance ds_configs/zero2_offload.json"
        )
    resolved = dsconfig.resolve(config.ds_config, config.train, config.given, world, model_config.hidden_size or 0)
    method = METHODS[resolved.train.method](config.method_config)
    train = with_restarts(resolved.train, method.restart_interval())
    resolved = dataclasses.replace(resolved, train=train)
    corpus = open_corpus(config.data, train, model_config.vocab_size or 0, resolved.global_batch_size)
    initialize_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    groups = initialize_groups(config.parallel)
    model = build_model(build, model_config, train, method)
    engine = ZeroEngine(model.module, model.layers, make_optimizer(model.module, train), resolved.deepspeed, groups)
    allocate = host_allocator(resolved.pin_host_memory)
    ctx = Context(
        model.layers, engine.state, train.seed, train.train_iters, groups.data_rank, groups.data_size, allocate,
        train.lr_restart_offset,
    )  # fmt: skip
    method.start(ctx)
    run = describe(config, model_config, resolved, corpus, groups)
    state = RunState(engine, method, RunTensors(model, engine.state, method, groups.data_rank), groups, run)
    position = state.load(config.output)
    report = Report(model_config, train, model, engine, method, resolved, groups)
    loop = assemble(config, resolved, corpus, ctx, method, engine, report, position)
    loop.save = state.saver(config.output)
    folder = output_folder(config)
    if rank == 0:
        write_run(folder, run)
        print(report.start(corpus, position), flush=True)
    loop.metrics.truncate_from(position.step + 1)
    evaluation = loop.run()
    if rank == 0:
        print(report.end(evaluation, corpus), flush=True)
    engine.close()
    torch.distributed.destroy_process_group()


def build_model(build: Builder, config: ModelConfig, train: TrainConfig, method: Method) -> BuiltModel:
    """The initialised model, still whole and in float32, on the CPU of every rank."""
    return build(
        config,
        method,
        length=train.seq_length,
        seed=train.seed,
        recompute=train.recompute_granularity == "full",
        forward_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        fold_residual=train.fold_residual,
    )


def make_optimizer(module: torch.nn.Module, train: TrainConfig) -> VectorClockAdamW:
    """AdamW over all trained tensors; vectors (norms) are not decayed, as in Megatron."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": train.weight_decay}]
    if train.weight_decay:
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
    return VectorClockAdamW(groups, train.lr or 0.0, (train.adam_beta1, train.adam_beta2), train.adam_eps)


def assemble(
    config: RunConfig,
    resolved: dsconfig.Resolved,
    corpus: Corpus,
    ctx: Context,
    method: Method,
    engine: ZeroEngine,
    report: Report,
    position: Position,
) -> Loop:
    """The loop of this rank; ``save`` is set by the caller."""
    folder = output_folder(config)
    main = int(os.environ["RANK"]) == 0
    return Loop(
        engine=engine,
        method=method,
        ctx=ctx,
        train=resolved.train,
        data=config.data,
        output=config.output,
        lr=resolved.train.lr or 0.0,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.accumulation,
        train_samples=corpus.train,
        eval_samples=corpus.valid,
        metrics=MetricsWriter(None if folder is None else folder / "metrics.jsonl", main),
        progress=Progress(resolved.train.train_iters, position.step, main),
        memory=report.current_memory,
        save=lambda position: None,
        bytes_per_token=corpus.bytes_per_token,
        flops_per_token=report.flops_per_token,
        peak_flops=report.peak_flops,
        position=position,
    )


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
        **{key: value for key, value in known.items() if value is not None},
        "versions": {"megalowrank": __version__, "torch": str(torch.__version__)},
    }


def write_run(folder: Path | None, run: dict[str, Any]) -> None:
    """Write ``run.json`` beside the output."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    except OSError as error:
        raise ConfigError("cannot write the output folder", f"{folder}: {error.strerror}") from None
