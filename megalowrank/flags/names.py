"""Names that users of other programs type, and what does the same here: behind error messages and the documentation."""

from __future__ import annotations

from dataclasses import dataclass

_DS = "DeepSpeed JSON: "


@dataclass(frozen=True)
class Foreign:
    """A flag of another program. ``here`` is a flag of ours with its value if any, or a sentence."""

    name: str
    source: str
    here: str

    @property
    def answer(self) -> str:
        """One line for whoever typed it."""
        if self.here.startswith("--"):
            return f"{self.name} is {self.here} here"
        return f"{self.name} has no flag here: {self.here}"


_SWITCHLORA = {
    "--use_lora": "--method lora",
    "--switch_lora": "--method switchlora",
    "--switch_lora_interval": "--switch-interval",
    "--switch_lora_descent_rate": "--switch-descent-rate",
    "--switch_descend_type": "--switch-schedule",
    "--fix_switch_lora_interval": "--switch-schedule constant",
    "--adam_warm_step": "--switch-freeze-steps",
    "--discontinuous_switch": "--switch-order random",
    "--no_offload_candidates": "--no-offload-candidates",
    "--init_lora_type": "--lora-init",
    "--force_disable_candidates": "--method lora",
    "--switch_lora_drop": "candidates are put back as they were trained",
    "--remain_switch_state": "the moments of a switched vector's counterpart are always reset",
    "--remain_switch_step_state": "the clock of a reset vector always starts again",
    "--zero_all_state": "only the counterpart's moments are reset",
    "--zero_init_B": "--lora-init classic starts B at 0, and both factors are switched",
    "--lora_scheduler": "it has no effect in the original either",
    "--change_lora_lr": "it has no effect in the original either",
    "--no_lora_lr_ratio": "it has no effect in the original either",
    "--adjust_lora_schedule": "it has no effect in the original either",
    "--add_weighted_rank": "it has no effect in the original either",
    "--cal_delta_norm": "tools/plot_run.py draws the singular values of the change of W",
    "--plot_rank": "tools/plot_run.py draws the singular values of the change of W",
}
_SHARED_BY_SEEDS = {
    "--training_config": "--config",
    "--model_config": "--preset",
    "--model_name_or_path": "--preset",
    "--lora_r": "--lora-rank",
    "--lora_dropout": "factors are trained without dropout",
    "--max_length": "--seq-length",
    "--batch_size": "--micro-batch-size",
    "--total_batch_size": "--global-batch-size",
    "--gradient_accumulation": "it follows from --global-batch-size, --micro-batch-size and the number of ranks",
    "--num_training_steps": "--train-iters",
    "--scheduler": "--lr-decay-style",
    "--warmup_steps": "--lr-warmup-iters",
    "--clip_grad_norm": "--clip-grad",
    "--grad_clipping": "--clip-grad",
    "--eval_every": "--eval-interval",
    "--save_every": "--save-interval",
    "--save_dir": "--save",
    "--keep_checkpoints": "--keep-last",
    "--resume_from": "--load",
    "--autoresume": "--load auto",
    "--dataset_path": "--data-path",
    "--dtype": "--bf16",
    "--optimizer": "the optimizer is AdamW",
    "--workers": "token files are mapped into memory, so no loader processes are needed",
    "--num_workers": "token files are mapped into memory, so no loader processes are needed",
    "--quantize": "frozen weights are kept in bfloat16 or float32",
    "--use_double_quant": "frozen weights are kept in bfloat16 or float32",
    "--load_optimizer_state_on_resume": "a resumed run continues with its optimizer state",
}
_RELORA = {
    "--use_peft": "--method relora",
    "--relora": "--relora-interval",
    "--cycle_length": "--lr-restart-interval",
    "--adjust_step": "--lr-restart-offset",
    "--restart_warmup_steps": "--lr-restart-warmup-iters",
    "--reset_optimizer_on_relora": "--relora-reset zero",
    "--optimizer_random_pruning": "--relora-reset random, and the share as --relora-prune-ratio",
    "--optimizer_magnitude_pruning": "--relora-reset magnitude, and the share as --relora-prune-ratio",
    "--warmed_up_model": "--load, with --finetune",
    "--min_lr_ratio": "--min-lr, a learning rate and not a ratio",
    "--train_scaling": "the scale of the low-rank term is alpha / r",
    "--force_keep_original": "W is always kept",
    "--max_train_tokens": "--train-iters",
    "--skip_batches": "samples are a function of seed and update",
    "--distributed_type": _DS + "zero_optimization.stage",
    "--megatron_dataset_config": "--data-path",
}
_GALORE = {
    "--galore_scale": "--proj-scale",
    "--proj_type": "the projector is on the narrower side of every matrix, as with std",
    "--golore": "--method golore",
    "--galore": "--method galore",
    "--single_gpu": "start the program with plain python for one rank",
}
_MEGATRON = {
    "--lr-warmup-fraction": "--lr-warmup-iters, a number of updates",
    "--lr-warmup-samples": "--lr-warmup-iters, a number of updates",
    "--lr-decay-samples": "--lr-decay-iters, a number of updates",
    "--train-samples": "--train-iters, a number of updates",
    "--save-retain-interval": "--keep-every",
    "--wandb-exp-name": "--wandb-name",
    "--wandb-save-dir": "--output-dir",
    "--recompute-activations": "--recompute-granularity full",
    "--checkpoint-activations": "--recompute-granularity full",
    "--use-distributed-optimizer": _DS + "zero_optimization.stage 1 or higher",
    "--optimizer-cpu-offload": _DS + "zero_optimization.offload_optimizer",
    "--overlap-grad-reduce": _DS + "zero_optimization.overlap_comm",
    "--fp16": "loss scaling is not supported; use --bf16",
    "--tokenizer-type": "it follows from --tokenizer-model",
    "--log-throughput": "throughput is in every log line",
    "--num-layers-per-virtual-pipeline-stage": "DeepSpeed's pipeline does not interleave",
    "--context-parallel-size": "context parallelism is not built",
    "--untie-embeddings-and-output-weights": "--no-tie-word-embeddings",
    "--swiglu": "it follows from the architecture",
    "--ckpt-format": "checkpoints are safetensors and JSON",
}
_DEEPSPEED = {
    "--zero-stage": _DS + "zero_optimization.stage",
    "--cpu-offload": _DS + "zero_optimization.offload_optimizer",
    "--deepspeed-activation-checkpointing": "--recompute-granularity full",
    "--deepscale": "--ds-config",
    "--deepscale_config": "--ds-config",
}
_TRAINER = {
    "--learning_rate": "--lr",
    "--max_steps": "--train-iters",
    "--num_train_epochs": "--train-iters, a number of updates",
    "--per_device_train_batch_size": "--micro-batch-size",
    "--gradient_accumulation_steps": "it follows from --global-batch-size, --micro-batch-size and the number of ranks",
    "--gradient_checkpointing": "--recompute-granularity full",
    "--lr_scheduler_type": "--lr-decay-style",
    "--max_grad_norm": "--clip-grad",
    "--logging_steps": "--log-interval",
    "--eval_steps": "--eval-interval",
    "--save_steps": "--save-interval",
    "--save_total_limit": "--keep-last",
    "--resume_from_checkpoint": "--load",
    "--report_to": "--wandb-project; TensorBoard is always written",
}
_SOURCES = {
    "SwitchLoRA": _SWITCHLORA,
    "ReLoRA": _RELORA,
    "GaLore, GoLore": _GALORE,
    "SwitchLoRA, ReLoRA, GoLore": _SHARED_BY_SEEDS,
    "Megatron-LM": _MEGATRON,
    "DeepSpeed": _DEEPSPEED,
    "transformers Trainer": _TRAINER,
}
FOREIGN = tuple(Foreign(name, source, here) for source, names in _SOURCES.items() for name, here in names.items())
_BY_FIELD = {entry.name[2:].replace("-", "_"): entry for entry in FOREIGN}


def foreign(name: str) -> Foreign | None:
    """The entry of a flag as typed or as a key of a file, with ``-`` or ``_``; None for a name nobody uses."""
    return _BY_FIELD.get(name.removeprefix("--").replace("-", "_"))
