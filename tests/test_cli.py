"""The command line: flags, help, refusals of one line, presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from megalowrank.cli import SECTIONS, RunConfig, parse
from megalowrank.config import ModelConfig
from megalowrank.engine.dsconfig import resolve
from megalowrank.errors import ConfigError, nearest
from megalowrank.methods import METHODS, method_class
from megalowrank.models.accounting.parameters import count_parameters
from megalowrank.models.presets import LLAMA, apply_preset

CONFIGS = {name: method.config_class for name, method in METHODS.items()}
ENOUGH = ["--preset", "llama_9m", "--micro-batch-size", "4", "--lr", "1e-3"]


def parsed(*words: str) -> RunConfig:
    return parse(words, CONFIGS, "pretrain_llama.py")


def everything(*words: str) -> Any:
    """All checks that need no file and no other process: flags, shape, batch and optimizer."""
    config = parsed(*ENOUGH, *words)
    model = apply_preset(config.model, None)
    return resolve({}, config.train, config.given, 2, model.hidden_size or 0), model


def refusal(call: Callable[..., Any], *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*words)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400, message
    return message


# ---------------------------------------------------------------- flags and help


def help_entries(method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What ``--help`` says about each flag, without line breaks."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parsed("--method", method, "--help")
    assert caught.value.code == 0
    blocks = re.split(r"\n  (?=-)", capsys.readouterr().out)
    return {block.split()[0].rstrip(","): " ".join(block.split()) for block in blocks[1:]}


def field_of(hint: Any) -> str:
    """A value in the spelling that the type wants; none is a default."""
    text = str(hint)
    return "7" if "int" in text else "0.625" if "float" in text else "word"


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_is_in_the_help(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = help_entries(method, capsys, monkeypatch)
    for cls in (*SECTIONS.values(), CONFIGS[method]):
        sample = cls()
        for item in dataclasses.fields(cls):
            entry = entries["--" + item.name.replace("_", "-")]
            default, unit = getattr(sample, item.name), item.metadata["unit"]
            assert len(item.metadata["help"]) > 10
            assert item.metadata["help"] in entry
            assert not unit or f"[{unit}]" in entry
            shown = " ".join(default) if isinstance(default, list) else str(default)
            assert default is None or f"(default: {shown})" in entry, entry
    own = {item.name for item in dataclasses.fields(CONFIGS[method])}
    foreign = {item.name for cls in CONFIGS.values() for item in dataclasses.fields(cls)} - own
    assert not foreign & {name[2:].replace("-", "_") for name in entries}


@pytest.mark.parametrize(
    ("flag", "unit", "default"),
    [
        ("--seq-length", "tokens", "512"),
        ("--lr-warmup-iters", "updates", "0"),
        ("--distributed-timeout-minutes", "minutes", "30"),
        ("--eval-iters", "batches", "10"),
        ("--switch-interval", "steps", "40"),
        ("--lora-rank", "", "128"),
    ],
)
def test_unit_and_default_as_a_user_reads_them(
    flag: str, unit: str, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = help_entries("switchlora", capsys, monkeypatch)[flag]
    assert (f" [{unit}] (default: {default})" if unit else f"matrix (default: {default})") in entry


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_is_a_flag_in_four_spellings(method: str) -> None:
    for name, cls in {**SECTIONS, "method_config": CONFIGS[method]}.items():
        for item in dataclasses.fields(cls):
            if item.metadata["choices"] or item.name in ("method", "load") or "bool" in str(item.type):
                continue
            value = field_of(item.type)
            for flag in (f"--{item.name}", "--" + item.name.replace("_", "-")):
                for words in ([flag, value], [f"{flag}={value}"]):
                    found = read_without_checks(name, item.name, "--method", method, *words)
                    assert str(found) in (value, f"['{value}']"), flag


def read_without_checks(section: str, field: str, *words: str) -> Any:
    """The value that a field gets, whatever the range checks say of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for cls in (*SECTIONS.values(), *CONFIGS.values()):
            monkeypatch.setattr(cls, "check", lambda self: None)
        monkeypatch.setattr("megalowrank.cli._check_profile", lambda diagnostics, train: None)
        config = parsed(*words)
    assert field in config.given
    return getattr(config.sections()[section], field)


def test_values_of_each_kind() -> None:
    config = parsed("--bf16", "--lora_target", "gate", "up", "--lr=2e-2", "--no-offload-candidates", "--seed", "0")
    assert (config.train.bf16, config.train.lr, config.train.seed) == (True, 2e-2, 0)
    assert config.method_config.lora_target == ["gate", "up"]
    assert config.method_config.offload_candidates is False
    assert config.given == {"bf16", "lora_target", "lr", "offload_candidates", "seed"}
    assert parsed("--no_bf16").train.bf16 is False
    assert parsed("--tokenizer-model=a_b--c_d").data.tokenizer_model == "a_b--c_d"


def test_what_launchers_add_is_accepted() -> None:
    config = parsed("--local_rank=1", "--deepspeed", "--deepspeed_config", "a_b.json")
    assert config.ds_config == "a_b.json"
    assert parsed("--ds-config", "c.json").ds_config == "c.json"


def test_nothing_said_is_every_default() -> None:
    config = parsed()
    for name, cls in SECTIONS.items():
        assert getattr(config, name) == cls()
    assert config.method_config == CONFIGS["switchlora"]() and config.ds_config is None


# ---------------------------------------------------------------- unknown flags and flags of another method


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        ("full", "--lora-rank"),
        ("full", "--lora_alpha"),
        ("lora", "--switch-interval"),
        ("lora", "--switch_freeze_steps=3"),
        ("full", "--no-offload-candidates"),
    ],
)
def test_a_flag_of_another_method_names_its_owners(method: str, flag: str) -> None:
    message = refusal(parsed, "--method", method, flag, "1")
    name = flag.partition("=")[0].replace("_", "-")
    field = name.removeprefix("--no-").removeprefix("--").replace("-", "_")
    owners = [m for m, cls in CONFIGS.items() if field in {item.name for item in dataclasses.fields(cls)}]
    assert "switchlora" in owners
    assert message == f"{name} does not belong to --method {method}; allowed: with --method {' or '.join(owners)}"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--switch_lora_interval", "--switch_lora_interval is --switch-interval here"),
        ("--switch-lora-interval=3", "--switch_lora_interval is --switch-interval here"),
        ("--adam_warm_step", "--adam_warm_step is --switch-freeze-steps here"),
        ("--wandb-exp-name", "--wandb-exp-name is --wandb-name here"),
        ("--zero_stage", "--zero-stage has no flag here: DeepSpeed JSON: zero_optimization.stage"),
        ("--learning_rate", "--learning_rate is --lr here"),
    ],
)
def test_a_flag_of_another_program_gets_ours(typed: str, answer: str) -> None:
    assert refusal(parsed, typed, "3") == answer


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--sequence-length", "--seq-length"),
        ("--learning-rate-warmup-iters", "--lr-warmup-iters"),
        ("--switch-intervall=3", "--switch-interval"),
        ("--micro_batchsize", "--micro-batch-size"),
        ("--ds-confg", "--ds-config"),
    ],
)
def test_an_unknown_flag_names_the_nearest(typed: str, meant: str) -> None:
    message = refusal(parsed, typed, "3")
    name = typed.partition("=")[0].replace("_", "-")
    assert message == f"unknown flag {name}, did you mean {meant}?"


def test_refusals_without_a_neighbour() -> None:
    assert refusal(parsed, "--xyzzyq") == "unknown flag --xyzzyq, see --help"
    assert "unexpected argument; got 'stray'" in refusal(parsed, "--seed", "3", "stray")
    assert "unknown flag --seq" in refusal(parsed, "--seq", "3"), "no abbreviations"
    assert "did you mean switchlora?" in refusal(parsed, "--method", "switch-lora")
    assert "did you mean lora?" in refusal(method_class, "lorra")


# ---------------------------------------------------------------- bad values, by flag

AT_LEAST_ONE = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "vocab-size",
    "seq-length", "micro-batch-size", "global-batch-size", "train-iters", "lr-decay-iters", "exit-interval",
    "distributed-timeout-minutes", "log-interval", "lora-rank", "switch-interval",
)  # fmt: skip
AT_LEAST_ZERO = (
    "lr-warmup-iters", "max-skipped-steps", "seed", "eval-interval", "eval-iters", "save-interval", "keep-last",
    "switch-freeze-steps",
)  # fmt: skip
REALS_FROM_ZERO = ("min-lr", "weight-decay", "adam-eps", "clip-grad", "norm-epsilon", "init-method-std")
REALS_ABOVE_ZERO = ("lr", "rotary-base", "lora-alpha", "switch-descent-rate")
BETAS = ("adam-beta1", "adam-beta2")
CHOICES = ("lr-decay-style", "recompute-granularity", "fold-residual", "lora-init", "switch-schedule", "switch-order")
TEXTS = ("method", "save", "load", "output-dir", "data-path", "tokenizer-model", "preset", "lora-target", "ds-config")
BAD = [
    *[(name, value) for name in AT_LEAST_ONE for value in ("0", "-3", "1.5", "many", "")],
    *[(name, value) for name in AT_LEAST_ZERO for value in ("-1", "0.5", "none")],
    *[(name, value) for name in REALS_FROM_ZERO for value in ("-1e-9", "nan", "inf", "small")],
    *[(name, value) for name in REALS_ABOVE_ZERO for value in ("0", "-1", "nan", "much")],
    *[(name, value) for name in ("lr", "rotary-base", "lora-alpha") for value in ("inf",)],
    *[(name, value) for name in BETAS for value in ("1", "1.5", "-0.1", "nan", "most")],
    *[(name, value) for name in CHOICES for value in ("", "wrong", "a\nb")],
    *[(f"{kind}-model-parallel-size", value) for kind in ("tensor", "pipeline") for value in ("0", "-1", "two")],
    *[(name, value) for name in TEXTS for value in ("", " ")],
    ("bf16", "yes"), ("no-bf16", "1"), ("offload-candidates", "no"), ("method", "wrong"), ("preset", "llama_8b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_names_its_flag(name: str, value: str) -> None:
    assert f"--{name}" in refusal(everything, f"--{name}={value}")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--switch-interval 9 --switch-freeze-steps 5", "--switch-interval --switch-freeze-steps 10"),
        ("--lr-warmup-iters 1001", "--lr-warmup-iters 1001"),
        ("--lr-warmup-iters 6 --lr-decay-iters 5", "--lr-warmup-iters 6"),
        ("--min-lr 2e-3", "--min-lr 0.002 0.001"),
        ("--load auto", "--load --save"),
        ("--save-interval 5", "--save-interval --save"),
        ("--keep-last 5", "--keep-last --save"),
        ("--wandb-name x", "--wandb-name --wandb-project"),
        ("--wandb-mode offline", "--wandb-mode --wandb-project"),
        ("--profile-ranks 1", "--profile-ranks --profile-steps"),
        ("--profile-steps 1000:1001", "--profile-steps 1000:1001 --train-iters 1000"),
        ("--train-data-path x --split 1,1,1", "--split --train-data-path 1,1,1"),
        ("--lr-decay-style constant --min-lr 1e-4", "--min-lr constant"),
        ("--lr-decay-style constant --lr-decay-iters 9", "--lr-decay-iters constant"),
        ("--switch-schedule constant --switch-descent-rate 0.2", "--switch-descent-rate constant"),
        ("--num-attention-heads 3", "--hidden-size --num-attention-heads 128 3"),
        ("--num-query-groups 3", "--num-attention-heads --num-query-groups 4 3"),
        ("--num-attention-heads 128", "--hidden-size --num-attention-heads"),
        ("--global-batch-size 9", "--global-batch-size --micro-batch-size 9 4 2"),
        ("--lora-target", "--lora-target"),
        ("--seed", "--seed"),
    ],
)
def test_values_that_do_not_go_together_name_both_flags(words: str, parts: str) -> None:
    message = refusal(everything, *words.split())
    assert all(part in message for part in parts.split()), message


@pytest.mark.parametrize(
    "words",
    [
        "--switch-interval 10 --switch-freeze-steps 5",
        "--switch-interval 1 --switch-freeze-steps 0",
        "--lr-warmup-iters 1000",
        "--min-lr 1e-3",
        "--load auto --save x",
        "--load x",
        "--adam-beta1 0 --adam-beta2 0.9999 --adam-eps 0 --weight-decay 0 --clip-grad 0 --seed 0 --keep-last 0",
        "--keep-last 1 --save x --wandb-mode offline --wandb-project x --train-data-path x",
        "--profile-steps 999:1001 --profile-ranks 1 --lr-decay-style constant --switch-schedule constant",
        "--num-attention-heads 64 --num-query-groups 1 --lora-rank 1 --lora-alpha 1e-3",
        "--eval-interval 0 --eval-iters 0 --max-skipped-steps 0 --train-iters 1 --exit-interval 1 --log-interval 1",
    ],
)
def test_values_at_the_edge_are_accepted(words: str) -> None:
    everything(*words.split())


@pytest.mark.parametrize("left_out", ["--preset", "--micro-batch-size", "--lr"])
def test_what_is_missing_is_named(left_out: str) -> None:
    at = ENOUGH.index(left_out)
    config = parsed(*ENOUGH[:at], *ENOUGH[at + 2 :])

    def use() -> None:
        resolve({}, config.train, config.given, 1, apply_preset(config.model, None).hidden_size or 0)

    assert left_out in refusal(use)


# ---------------------------------------------------------------- presets

# hidden, ffn, layers, heads, millions of parameters with 32100 tokens: as published
PUBLISHED = {
    "llama_9m": (128, 352, 4, 4, 9.0),
    "llama_20m": (256, 688, 4, 4, 19.6),
    "llama_35m": (384, 1024, 6, 8, 35.3),
    "llama_60m": (512, 1376, 8, 8, 58.2),
    "llama_130m": (768, 2048, 12, 12, 134.3),
    "llama_250m": (768, 2560, 24, 16, 247.5),
    "llama_350m": (1024, 2736, 24, 16, 368.2),
    "llama_1b": (2048, 5461, 24, 32, 1339.5),
    "llama_3b": (2560, 6848, 32, 32, 2686.3),
    "llama_7b": (4096, 11008, 32, 32, 6739.2),
}


def test_there_are_no_other_presets() -> None:
    assert list(LLAMA) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name: str) -> None:
    found = apply_preset(ModelConfig(preset=name), None)
    *shape, millions = PUBLISHED[name]
    assert [found.hidden_size, found.ffn_hidden_size, found.num_layers, found.num_attention_heads] == shape
    assert (found.num_query_groups, found.vocab_size, found.norm_epsilon) == (found.num_attention_heads, 32100, 1e-6)
    assert count_parameters(found, None).total / 1e6 == pytest.approx(millions, rel=0.005)


def test_flags_override_the_preset() -> None:
    words = "--preset llama_60m --num-layers 3 --ffn-hidden-size 100 --num-query-groups 2 --vocab-size 500"
    found = apply_preset(parsed(*words.split()).model, 400)
    assert (found.num_layers, found.ffn_hidden_size, found.num_query_groups, found.vocab_size) == (3, 100, 2, 500)
    assert (found.hidden_size, found.num_attention_heads) == (512, 8)


def test_the_tokenizer_decides_the_vocabulary_unless_a_flag_does() -> None:
    assert apply_preset(ModelConfig(preset="llama_9m"), 777).vocab_size == 777
    assert apply_preset(ModelConfig(preset="llama_9m", vocab_size=1000), 777).vocab_size == 1000
    message = refusal(lambda: apply_preset(ModelConfig(preset="llama_9m", vocab_size=700), 777))
    assert "--vocab-size" in message and "777" in message and "700" in message


def test_an_unknown_preset_names_the_nearest() -> None:
    message = refusal(lambda: apply_preset(ModelConfig(preset="llama-130m"), None))
    assert message.startswith("--preset is unknown; got 'llama-130m'") and "did you mean llama_130m?" in message
    assert nearest("nothing like it", LLAMA) is None


def test_without_a_preset_every_size_is_asked_for() -> None:
    assert "--num-layers is missing" in refusal(lambda: apply_preset(ModelConfig(), 300))
    shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    assert "--vocab-size is missing" in refusal(lambda: apply_preset(ModelConfig(**shape), None))
    assert apply_preset(ModelConfig(**shape), 300).num_query_groups == 2
