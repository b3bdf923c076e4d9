"""Configuration dataclasses: one per concern, each field with its help and unit.

The command line and ``--help`` are generated from these fields, so a flag is added by adding a
field. A section validates itself in ``check``; what involves two sections is checked where they meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalowrank.errors import ConfigError


def flag(
    default: Any, text: str, *, unit: str = "", choices: tuple = (), nargs: str | None = None, free: bool = False
) -> Any:
    """A dataclass field that is also a command-line flag.

    ``text`` is the help line, ``unit`` the unit of the value, ``choices`` the allowed values and
    ``nargs`` is passed to argparse for lists. ``free``: the value may change when a run is resumed, although
    others of its section may not.
    """
    metadata = {"help": text, "unit": unit, "choices": choices, "nargs": nargs, "free": free}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise ConfigError unless ``minimum`` <= ``value`` < infinity; ``name`` is the flag without dashes."""
    if not minimum <= value < math.inf:
        finite = ", finite" if isinstance(minimum, float) else ""
        raise ConfigError(f"--{name} is out of range", value, f">= {minimum}{finite}")


def above(name: str, value: float, bound: float) -> None:
    """Raise ConfigError unless ``bound`` < ``value`` < infinity; ``name`` is the flag without dashes."""
    if not bound < value < math.inf:
        raise ConfigError(f"--{name} is out of range", value, f"> {bound}, finite")


@dataclass
class ModelConfig:
    """Shape of the transformer; a preset fills what is not given."""

    preset: str | None = flag(None, "published model shape, e.g. llama_350m; other flags override it", free=True)
    model_family: str | None = flag(
        None, "llama, gpt2, neox (GPT-NeoX, Pythia) or opt; default: the preset's, else the program's first"
    )
    num_layers: int | None = flag(None, "transformer blocks")
    hidden_size: int | None = flag(None, "width of the residual stream")
    ffn_hidden_size: int | None = flag(None, "width of the MLP; default: 4 x --hidden-size where it is not gated")
    num_attention_heads: int | None = flag(None, "query heads")
    num_query_groups: int | None = flag(None, "key/value heads (grouped-query attention); default: as query heads")
    vocab_size: int | None = flag(None, "rows of the embedding; default: the tokenizer's, else the preset's")
    max_position_embeddings: int | None = flag(
        None, "rows of the learned position embedding; default: the preset's, else --seq-length"
    )
    norm_impl: str = flag(
        "torch", "norms of torch, or the fused ones of NVIDIA apex, if installed", choices=("torch", "apex"), free=True
    )
    norm_epsilon: float | None = flag(None, "epsilon of the norms; default: 1e-6 (llama) or 1e-5")
    rotary_base: float | None = flag(None, "base of the rotary position embedding; default: 10000")
    rotary_percent: float | None = flag(None, "share of every head that is rotated; default: 1 (llama) or 0.25 (neox)")
    tie_word_embeddings: bool | None = flag(
        None, "use the embedding as the output projection; default: yes for gpt2 and opt, no for others"
    )
    init_method_std: float = flag(0.02, "standard deviation of the initial weights")
    num_labels: int | None = flag(
        None, "outputs of the head of --task classification, 1 of a regression; default: as many as the data have"
    )

    def check(self) -> None:
        """Every size is present, positive and divides where it has to; defaults are filled in before."""
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*sizes, "vocab_size"):
            value = getattr(self, name)
            if value is None:
                raise ConfigError(f"--{name.replace('_', '-')} is missing", None, "a value, or --preset")
            at_least(name.replace("_", "-"), value, 1)
        hidden, heads, groups = self.hidden_size or 1, self.num_attention_heads or 1, self.num_query_groups or 1
        if hidden % heads:
            raise ConfigError("--hidden-size must be a multiple of --num-attention-heads", f"{hidden} and {heads}")
        if heads % groups:
            raise ConfigError("--num-attention-heads must be a multiple of --num-query-groups", f"{heads} and {groups}")
        at_least("norm-epsilon", 0.0 if self.norm_epsilon is None else self.norm_epsilon, 0.0)
        at_least("init-method-std", self.init_method_std, 0.0)
        if self.max_position_embeddings is not None:
            at_least("max-position-embeddings", self.max_position_embeddings, 1)
        if self.num_labels is not None:
            at_least("num-labels", self.num_labels, 1)
        if self.rotary_percent is not None:
            self._check_rotary()

    def rotary_width(self) -> int:
        """Elements of a head that are rotated."""
        return int((self.hidden_size or 0) // (self.num_attention_heads or 1) * (self.rotary_percent or 0.0))

    def _check_rotary(self) -> None:
        """Positions rotate pairs of elements."""
        above("rotary-base", self.rotary_base or 0.0, 0.0)
        if not 0.0 < (self.rotary_percent or 0.0) <= 1.0:
            raise ConfigError("--rotary-percent is out of range", self.rotary_percent, "0 < share <= 1")
        width = self.rotary_width()
        if width % 2 or not width:
            raise ConfigError(
                "--hidden-size over --num-attention-heads, times --rotary-percent, must be even for rotary positions",
                width,
                "an even number, at least 2",
            )


@dataclass
class TrainConfig:
    """Length, batch, optimizer and schedule of a run."""

    method: str = flag("switchlora", "what is trained, and how")
    task: str = flag(
        "language-modeling", "what is learned: the next token, or the labels of --labelled-data (or their values)",
        choices=("language-modeling", "classification"),
    )  # fmt: skip
    seq_length: int = flag(512, "length of a sample", unit="tokens")
    micro_batch_size: int | None = flag(None, "samples of one forward pass on one rank")
    global_batch_size: int | None = flag(None, "samples of one update over all ranks")
    train_iters: int = flag(1000, "updates of the run", unit="updates")
    epochs: int | None = flag(
        None, "passes over --labelled-data, instead of --train-iters; the last update is filled from the next pass"
    )
    lr: float | None = flag(None, "peak learning rate; default: optimizer.params.lr of the DeepSpeed JSON")
    min_lr: float = flag(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = flag(
        "cosine", "shape of the decay", choices=("constant", "linear", "cosine", "cosine_restarts")
    )
    lr_warmup_iters: int = flag(0, "updates of linear warm-up from 0", unit="updates")
    lr_decay_iters: int | None = flag(
        None, "update at which --min-lr is reached; default: --train-iters", unit="updates"
    )
    lr_restart_interval: int | None = flag(
        None, "updates between restarts of cosine_restarts; default: the method's interval", unit="updates"
    )
    lr_restart_warmup_iters: int = flag(0, "updates of linear warm-up after a restart", unit="updates")
    lr_restart_offset: int = flag(0, "updates by which restarts and merges come earlier", unit="updates")
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW")
    adam_beta1: float = flag(0.9, "decay of exp_avg")
    adam_beta2: float = flag(0.999, "decay of exp_avg_sq")
    adam_eps: float = flag(1e-8, "epsilon of AdamW")
    clip_grad: float = flag(1.0, "bound of the global gradient norm; 0 turns clipping off")
    seed: int = flag(1234, "seed of initial weights, data order and every draw of a method")
    bf16: bool = flag(False, "train in bfloat16 with fp32 masters; default: as the DeepSpeed JSON says")
    recompute_granularity: str = flag(
        "none", "activation checkpointing: recompute each block (non-reentrant)", choices=("none", "full")
    )
    fold_residual: str = flag(
        "int16", "what W keeps beside bfloat16 so that folds do not drift", choices=("none", "int8", "int16")
    )
    max_skipped_steps: int = flag(10, "non-finite updates that a run survives", unit="updates")
    exit_interval: int | None = flag(None, "stop after this many updates of this process", unit="updates")
    exit_duration_in_mins: int | None = flag(
        None, "save and stop, as a signal would, this long after the start of the process", unit="minutes"
    )

    def check(self) -> None:
        """Ranges of single values."""
        for name, minimum in (
            ("seq_length", 1), ("train_iters", 1), ("lr_warmup_iters", 0), ("min_lr", 0.0), ("clip_grad", 0.0),
            ("weight_decay", 0.0), ("max_skipped_steps", 0), ("adam_eps", 0.0), ("seed", 0),
            ("lr_restart_warmup_iters", 0), ("lr_restart_offset", 0),
        ):  # fmt: skip
            at_least(name.replace("_", "-"), getattr(self, name), minimum)
        for name in (
            "micro_batch_size", "global_batch_size", "lr_decay_iters", "lr_restart_interval", "exit_interval",
            "exit_duration_in_mins", "epochs",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                at_least(name.replace("_", "-"), getattr(self, name), 1)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"--{name.replace('_', '-')} is out of range", getattr(self, name), "0 <= beta < 1")
        if self.epochs is None:
            self.check_warmup()
        for name in ("min_lr", "lr_decay_iters") if self.lr_decay_style == "constant" else ():
            if getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} has no effect with --lr-decay-style constant")

    def check_warmup(self) -> None:
        """The decay does not end before the warm-up; with ``epochs`` it is known when ``train_iters`` is."""
        if self.lr_warmup_iters > (self.lr_decay_iters or self.train_iters):
            raise ConfigError("--lr-warmup-iters is longer than the decay", self.lr_warmup_iters)


@dataclass
class ParallelConfig:
    """How the model is laid out over ranks."""

    tensor_model_parallel_size: int = flag(1, "ranks that share every layer: tensor-parallel degree")
    pipeline_model_parallel_size: int = flag(1, "stages that share the layers: pipeline-parallel degree")
    sequence_parallel: bool = flag(False, "split activations between linears by position over tensor-parallel ranks")
    lowrank_schedule: str = flag(
        "auto",
        "how low-rank products cross tensor-parallel ranks: within the layer's own collective (ride), repeated on each "
        "with a reduction of the gradient (partial), or whichever costs less (auto)",
        choices=("auto", "ride", "partial"),
    )
    replica_check_interval: int = flag(
        1000, "updates between comparisons of what ranks hold alike; 0: never", unit="updates"
    )
    distributed_timeout_minutes: int = flag(30, "how long a collective may take", unit="minutes")
    hang_timeout: int = flag(
        1800, "end the run, showing all stacks, when nothing happened for so long; 0: never", unit="seconds"
    )

    def check(self) -> None:
        """Ranges, and flags that need tensor parallelism."""
        at_least("tensor-model-parallel-size", self.tensor_model_parallel_size, 1)
        at_least("pipeline-model-parallel-size", self.pipeline_model_parallel_size, 1)
        at_least("replica-check-interval", self.replica_check_interval, 0)
        at_least("distributed-timeout-minutes", self.distributed_timeout_minutes, 1)
        at_least("hang-timeout", self.hang_timeout, 0)
        if self.tensor_model_parallel_size == 1:
            if self.sequence_parallel:
                raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1", 1)
            if self.lowrank_schedule != "auto":
                raise ConfigError(
                    "--lowrank-schedule has no effect without --tensor-model-parallel-size above 1",
                    self.lowrank_schedule,
                )


@dataclass
class DataConfig:
    """Where the tokens come from."""

    data_path: list | None = flag(
        None, "prefix of Megatron .bin/.idx files, or a blend of several: W1 PREFIX1 W2 PREFIX2 ...", nargs="+"
    )
    train_data_path: list | None = flag(
        None, "prefix or blend to train on, instead of --data-path and --split", nargs="+"
    )
    valid_data_path: list | None = flag(None, "prefix or blend to evaluate on, with --train-data-path", nargs="+")
    split: str = flag("969,30,1", "shares of train, validation and test documents")
    tokenizer_model: str | None = flag(
        None, "tokenizer that the tokens were made with: sentencepiece model or Hugging Face folder"
    )
    labelled_data: str | None = flag(
        None, "task to learn: folder of train.jsonl and validation.jsonl (text, perhaps text_pair, label), folder of "
        "save_to_disk, GLUE task, or NAME[:CONFIG] on the hub",
    )  # fmt: skip
    eval_interval: int | None = flag(
        None, "updates between evaluations; 0: only at the end; default: 100, of a labelled task its epochs",
        unit="updates",
    )  # fmt: skip
    eval_iters: int = flag(10, "global batches per evaluation; 0: none", unit="batches")

    def check(self) -> None:
        """Ranges of single values, and that data are named in one way."""
        if self.data_path and (self.train_data_path or self.valid_data_path):
            raise ConfigError("--data-path is split by --split", "--train-data-path or --valid-data-path as well")
        if self.valid_data_path and not self.train_data_path:
            raise ConfigError("--valid-data-path needs --train-data-path")
        if self.train_data_path and self.split != DataConfig.split:
            raise ConfigError("--split has no effect with --train-data-path", self.split)
        if self.eval_interval is not None:
            at_least("eval-interval", self.eval_interval, 0)
        at_least("eval-iters", self.eval_iters, 0)


def _folders(checkpoint: str) -> tuple[Path, Path]:
    """The folder that is named, and the one above it: a checkpoint lies in the folder of its run."""
    path = Path(checkpoint).resolve()
    return path, path.parent


@dataclass
class OutputConfig:
    """What is written, where, and how often."""

    output_dir: str | None = flag(
        None, "folder of metrics.jsonl and the resolved configuration; default: --save, else none"
    )
    save: str | None = flag(None, "folder of checkpoints")
    load: str | None = flag(
        None, "checkpoint to resume: a folder of checkpoints, one checkpoint, or 'auto' (newest in --save)"
    )
    finetune: bool = flag(
        False, "start at update 0 with the weights of --load, any method; once --save has a checkpoint, resume that"
    )
    save_interval: int = flag(0, "updates between checkpoints; 0: only at the end", unit="updates")
    save_seconds: int = flag(0, "time between checkpoints, besides --save-interval; 0: any", unit="seconds")
    async_save: bool = flag(True, "write checkpoints while training goes on, from a copy of the state in host memory")
    keep_last: int = flag(0, "newest checkpoints that are kept; 0: all")
    keep_every: int = flag(0, "with --keep-last: keep those of every so many updates as well", unit="updates")
    log_interval: int = flag(10, "updates between log lines", unit="updates")
    tensorboard_dir: str | None = flag(None, "folder of TensorBoard events; default: tensorboard in the output folder")
    wandb_project: str | None = flag(None, "project of Weights & Biases to log to; default: none")
    wandb_name: str | None = flag(None, "name of the run there; default: the output folder's")
    wandb_mode: str = flag("online", "send at once, or keep for wandb sync", choices=("online", "offline"))

    def check(self) -> None:
        """Ranges of single values, and that --load auto has somewhere to look."""
        at_least("log-interval", self.log_interval, 1)
        self._check_saving()
        if self.finetune and self.load in (None, "auto"):
            raise ConfigError("--finetune needs --load with the checkpoint to start from", self.load)
        if self.finetune and self.save and Path(self.save).resolve() in _folders(self.load or ""):
            raise ConfigError("--finetune with --save in the folder of --load would overwrite its run", self.save)
        if self.load == "auto" and not self.save:
            raise ConfigError("--load auto looks in --save, which is not given")
        for name in ("wandb_name", "wandb_mode"):
            if getattr(self, name) != getattr(OutputConfig, name) and not self.wandb_project:
                raise ConfigError(f"--{name.replace('_', '-')} needs --wandb-project")

    def _check_saving(self) -> None:
        for name in ("save_interval", "save_seconds", "keep_last", "keep_every"):
            at_least(name.replace("_", "-"), getattr(self, name), 0)
        for name in ("save_interval", "save_seconds", "keep_last"):
            if getattr(self, name) and not self.save:
                raise ConfigError(f"--{name.replace('_', '-')} needs --save")
        if self.keep_every and not self.keep_last:
            raise ConfigError("--keep-every has no effect without --keep-last: all are kept", self.keep_every)
        if not self.async_save and not self.save:
            raise ConfigError("--no-async-save needs --save")


@dataclass
class DiagnosticsConfig:
    """What is looked at besides training."""

    dry_run: bool = flag(False, "build everything, print the tables and stop; nothing is written")
    profile_steps: str | None = flag(
        None, "updates FIRST:LAST (0-based, LAST is left out) that torch's profiler records", unit="updates"
    )
    profile_ranks: list = flag(["0"], "ranks that record", nargs="+")
    memory_snapshot: bool = flag(False, "record the GPU allocator over --profile-steps")
    comms_summary: bool = flag(False, "count the bytes of collectives by group, in log lines and at the end")

    def check(self) -> None:
        """Ranges of updates and ranks."""
        self.profiled()
        if self.profile_steps is None and self.memory_snapshot:
            raise ConfigError("--memory-snapshot needs --profile-steps")
        if self.profile_steps is None and self.ranks() != [0]:
            raise ConfigError("--profile-ranks needs --profile-steps")

    def profiled(self) -> range | None:
        """The updates that are recorded."""
        if self.profile_steps is None:
            return None
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ConfigError("--profile-steps is malformed", repr(self.profile_steps), "FIRST:LAST, like 10:13")
        return range(int(first), int(last))

    def ranks(self) -> list[int]:
        """The ranks that record."""
        for word in self.profile_ranks:
            if not str(word).isdecimal():
                raise ConfigError("--profile-ranks is malformed", repr(word), "rank numbers")
        return [int(word) for word in self.profile_ranks]
