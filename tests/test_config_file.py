"""--config: every flag as a key, run.json of an earlier run, and refusals that name key and file."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalowrank.cli import SECTIONS, RunConfig, parse
from megalowrank.engine.dsconfig import resolve
from megalowrank.errors import ConfigError
from megalowrank.flags.fields import Flag, flags_of
from megalowrank.flags.names import FOREIGN
from megalowrank.methods import METHODS
from tests.harness import ROOT

CONFIGS = {name: method.config_class for name, method in METHODS.items()}
Write = Callable[..., RunConfig]


@pytest.fixture
def with_file(tmp_path: Path) -> Write:
    """Parses flags beside a file of this text (or of this value, as JSON)."""

    def call(content: Any, *words: str, name: str = "run.yaml") -> RunConfig:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        before = sorted(tmp_path.iterdir())
        try:
            return parse(["--config", str(path), *words], CONFIGS, "pretrain_llama.py")
        finally:
            assert sorted(tmp_path.iterdir()) == before

    return call


def refusal(call: Callable[..., Any], *words: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*words, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500, message
    return message


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values out of range are taken, so that every field can be set to something else than its default."""
    for cls in (*SECTIONS.values(), *CONFIGS.values()):
        monkeypatch.setattr(cls, "check", lambda self: None)
    monkeypatch.setattr("megalowrank.cli._check_profile", lambda diagnostics, train: None)


def another(item: Flag) -> Any:
    """A value that is not the default."""
    if item.choices:
        return next(choice for choice in item.choices if choice != item.default)
    return {bool: not item.default, int: 7, float: 0.625, str: "a_word", list: ["one", "two"]}[item.kind]


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("form", ["flat", "dashes", "nested", "yaml"])
def test_every_flag_is_a_key(method: str, form: str, with_file: Write, unchecked: None) -> None:
    classes = {**SECTIONS, "method_config": CONFIGS[method]}
    nested = {name: {item.name: another(item) for item in flags_of(cls)} for name, cls in classes.items()}
    nested["train"]["method"] = method
    flat = {key: value for section in nested.values() for key, value in section.items()}
    dashed = {key.replace("_", "-"): value for key, value in flat.items()}
    content = {"flat": flat, "dashes": dashed, "nested": nested, "yaml": yaml.safe_dump(nested)}[form]
    found = with_file(content, name="run.yaml" if form == "yaml" else "run.json")
    assert {name: dataclasses.asdict(section) for name, section in found.sections().items()} == nested
    assert found.given == set(flat)


def test_a_file_by_hand(with_file: Write) -> None:
    text = """
# a comment
preset: llama_9m
train:
  method: lora
  lr: 1e-2            # a number, although YAML 1.1 calls it text
  adam-beta2: .95
  micro-batch-size: 0012
lora_target: [q, k, no]
data:
split: 95,5,0
bf16: true
lr_decay_iters:
ds_config: ds_configs/zero2.json
deepspeed: true
"""
    found = with_file(text, "--adam_beta2", "0.5", "--lora-target", "up", "--seed=9")
    assert (found.model.preset, found.train.lr, found.train.micro_batch_size) == ("llama_9m", 1e-2, 12)
    assert (found.train.adam_beta2, found.method_config.lora_target, found.train.seed) == (0.5, ["up"], 9)
    assert (found.train.bf16, found.data.split, found.train.lr_decay_iters) == (True, "95,5,0", None)
    assert found.ds_config == "ds_configs/zero2.json"
    assert found.given == {
        "preset", "method", "lr", "adam_beta2", "micro_batch_size", "lora_target", "split", "bf16", "seed",
    }  # fmt: skip


def test_typed_flags_win(with_file: Write) -> None:
    content = {"lr": 1.0, "bf16": True, "ds_config": "a.json", "method": "switchlora", "seed": 3}
    found = with_file(content, "--no-bf16", "--ds-config", "b.json", "--method", "full", "--lr=2", name="x.json")
    assert (found.train.lr, found.train.bf16, found.train.method, found.train.seed) == (2.0, False, "full", 3)
    assert found.ds_config == "b.json" and type(found.method_config) is CONFIGS["full"]


def test_numbers_of_lists_and_single_words(with_file: Write) -> None:
    assert with_file("lora_target: [0.5, 3, q]").method_config.lora_target == ["0.5", "3", "q"]
    assert with_file("lora_target: q").method_config.lora_target == ["q"]
    assert with_file("lr: 1", "--seed", "0").train.lr == 1.0


# ---------------------------------------------------------------- run.json of an earlier run


def earlier_run(method: str, ds_config: str, *words: str, ranks: int = 2) -> tuple[dict[str, Any], Any]:
    """What a run with these flags writes as run.json, and what its DeepSpeed configuration resolved to."""
    config = parse(["--method", method, *words], CONFIGS, "pretrain_llama.py")
    resolved = resolve(str(ROOT / "ds_configs" / ds_config), config.train, config.given, ranks, 128)
    sections = {name: dataclasses.asdict(section) for name, section in config.sections().items()}
    sections["train"] = dataclasses.asdict(resolved.train) | {
        "micro_batch_size": resolved.micro_batch_size, "global_batch_size": resolved.global_batch_size,
    }  # fmt: skip
    run = {
        **sections, "method": method, "deepspeed": resolved.deepspeed, "world_size": ranks, "unigram_loss": 6.0,
        "bytes_per_token": 2.6, "versions": {"megalowrank": "0.1.0", "torch": "2.13.0+cpu"},
    }  # fmt: skip
    return run, resolved


WORDS = ["--lr=3e-3", "--micro-batch-size=2", "--global-batch-size=16", "--clip-grad=0.5", "--weight-decay=0.1"]


@pytest.mark.parametrize("ds_config", sorted(path.name for path in (ROOT / "ds_configs").glob("*.json")))
@pytest.mark.parametrize("method", CONFIGS)
def test_run_json_gives_the_same_run(method: str, ds_config: str, with_file: Write) -> None:
    run, resolved = earlier_run(method, ds_config, *WORDS, *(["--bf16"] if ds_config == "zero1.json" else []))
    found = with_file(run, name="run.json")
    sections = {name: dataclasses.asdict(section) for name, section in found.sections().items()}
    assert sections == {name: run[name] for name in sections}
    assert found.ds_config is not None
    again = resolve(found.ds_config, found.train, found.given, 2, 128)
    assert again == dataclasses.replace(resolved, train=again.train)
    assert dataclasses.asdict(again.train) == run["train"]
    assert found.notes and "megalowrank 0.1.0, torch 2.13.0+cpu, world size 2" in found.notes[0]


@pytest.mark.parametrize(("ranks", "words", "accumulation"), [(1, [], 8), (4, [], 2), (2, ["--micro_batch_size=8"], 1)])
def test_run_json_on_other_ranks_keeps_the_global_batch(
    ranks: int, words: list[str], accumulation: int, with_file: Write
) -> None:
    found = with_file(earlier_run("lora", "zero2.json", *WORDS)[0], *words, "--no-bf16", "--clip-grad=2", name="r.json")
    again = resolve(found.ds_config or "", found.train, found.given, ranks, 128)
    assert (again.global_batch_size, again.accumulation, again.train.clip_grad) == (16, accumulation, 2.0)


def test_run_json_with_another_method(with_file: Write) -> None:
    run = earlier_run("switchlora", "zero2.json", *WORDS, "--lora-rank", "4", "--switch-interval", "20")[0]
    lora = with_file(run, "--method", "lora", name="run.json")
    assert type(lora.method_config) is CONFIGS["lora"] and lora.method_config.lora_rank == 4
    assert any("left out" in note and "method_config.switch_interval" in note for note in lora.notes)
    full = with_file(run, "--method", "full", name="run.json")
    assert any("method_config.lora_rank" in note for note in full.notes)
    run["method"] = "lora"
    assert "method" in refusal(with_file, run, name="run.json")
    run["train"]["method"] = "lora"
    message = refusal(with_file, run, name="run.json")
    assert "method_config.switch_interval" in message and "with switchlora" in message


def test_run_json_of_a_warm_started_run_is_resumed_by_load_auto(with_file: Write) -> None:
    run = earlier_run("lora", "zero2.json", *WORDS, "--load", "full", "--finetune", "--save", "x")[0]
    again, resumed = with_file(run, name="run.json"), with_file(run, "--load", "auto", name="run.json")
    assert (again.output.load, again.output.finetune) == ("full", True)
    assert (resumed.output.load, resumed.output.finetune) == ("auto", False)
    assert any("--load auto resumes" in note for note in resumed.notes)
    assert "--finetune needs --load" in refusal(with_file, run, "--load", "auto", "--finetune", name="run.json")


def test_facts_of_a_run_are_no_settings(with_file: Write) -> None:
    for key in ("world_size", "unigram_loss", "bytes_per_token"):
        message = refusal(with_file, {key: 3}, name="run.json")
        assert key in message and "run.json" in message and "is no setting" in message


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seq_len: 3", "seq_len; did you mean seq_length?"),
        ("train: {lora-rnk: 3}", "train.lora-rnk; did you mean lora_rank?"),
        ("switch_lora_interval: 3", "--switch_lora_interval is --switch-interval here"),
        ("train: {lora_rank: 3}", "train.lora_rank; method_config.lora_rank"),
        ("method: full\nlora_rank: 3", "lora_rank; with"),
        ("seq_length: '512'", 'seq_length; whole number; got "512"'),
        ("seq_length: 512.0", "seq_length; whole number; got 512.0"),
        ("seq_length: 5e2", "seq_length; whole number; got 500.0"),
        ("seq_length: true", "seq_length; whole number; got true"),
        ("seq_length: [1]", "seq_length; got a list of 1"),
        ("seq_length: {a: 1}", "seq_length; got a section"),
        ("seq_length:", "seq_length; got null"),
        ("seq_length: " + "9" * 400, "seq_length; got a huge number"),
        ("seq_length: " + "9" * 5000, "run.yaml; digits"),
        ("lr: '1e-4'", 'lr; a number; got "1e-4"'),
        ("lr: fast", "lr; a number"),
        ("lr: 1:30", "lr; a number"),
        ("lr: true", "lr; a number; got true"),
        ("lr: .inf", "lr; a number"),
        ("lr: .nan", "lr"),
        ("lr: 1e999", "lr; a number"),
        ("bf16: yes", 'bf16; true or false; got "yes"'),
        ("bf16: 1", "bf16; true or false; got 1"),
        ("data_path: 2024-01-01\nseed: 2024-01-01", "seed; whole number"),
        ("split: 5", "split; text; got 5"),
        ("load: \"a\\0b\"", "load; text"),
        ("lr_decay_style: sine", "lr_decay_style; constant, linear, cosine"),
        ("lora_target: []", "lora_target; empty"),
        ("data_path: [a, '']", "data_path; empty"),
        ("save: ' '", "save; empty"),
        ("method: ''", "method; empty"),
        ("ds_config: ''", "ds_config; not usable; a path"),
        ("lora_target: [[q]]", "lora_target; list of words"),
        ("method: 3", "method; got 3"),
        ("method: wrong", "--method is unknown"),
        ("lora_rank: 0", "--lora-rank is out of range"),
        ("lr: 1\nlr: 2", 'line 2; "lr" stands there twice'),
        ("adam-eps: 1\nadam_eps: 2", "adam_eps; twice; adam-eps and adam_eps"),
        ("lr: 1\ntrain: {lr: 1}", "train.lr; twice"),
        ("train: 3", "train; no section; got 3"),
        ("train: [lr]", "train; no section"),
        ("3: 4", "line 1; not a name"),
        ("? [a]\n: 4", "line 1; not a name"),
        ("local_rank: 0", "local_rank; launcher"),
        ("config: a.yaml", "config; no further file"),
        ("ds_config: {a: 1}", "ds_config; a path"),
        ("deepspeed: a.json", "deepspeed; path goes under ds_config"),
        ("deepspeed: false", "deepspeed; got false"),
        ("ds_config: a\ndeepspeed: {}", "deepspeed; second"),
        ("", "does not hold settings; got null"),
        ("- lr", "does not hold settings; got a list"),
        ("just words", "does not hold settings"),
        ("lr: 1\n---\nlr: 2", "expected a single document"),
        ("lr: [1", "line"),
        ("\tlr: 1", "line 1"),
        ("lr: !!python/object/apply:os.system ['true']", "line 1; tags"),
        ("lr: !!float 3", "line 1; tags"),
        ("a: &x {lr: 1}\n<<: *x", "line 2; aliases"),
        ("<<: {lr: 1}", "<<; unknown"),
        ("lr: &x [*x]", "aliases"),
        ("[" * 5000, "deeper than 16"),
        ("a: " * 3000, "not"),
        ("lr: \x00", "run.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_names_key_and_file(text: str, parts: str, with_file: Write) -> None:
    message = refusal(with_file, text)
    for part in parts.split("; "):
        assert part in message, message
    assert "run.yaml" in message or message.startswith("--"), message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"lr": 1, "lr": 2}', "twice"), (b'{"lr": NaN}', "NaN is not a number"), (b"{", "not valid"),
        (b"[" * 60000, "not valid"), (b'{"a": ' * 40 + b"1" + b"}" * 40, "deeper than 16"), (b"", "not valid"),
        (b'{"lr": 1e999}', "lr"), (b'{"lr": ' + b"9" * 400 + b"}", "huge"), (b"\xff\xfe", "UTF-8"),
        (b'{"seed": "\\ud800"}', "seed"), (b'{"\\ud800\\n": 1}', "unknown"), (b"7", "does not hold settings"),
        (b" " * 70000 + b"{}", "too long"),
    ],
)  # fmt: skip
def test_json_that_is_refused(content: bytes, part: str, with_file: Write) -> None:
    message = refusal(with_file, content, name="run.json")
    assert part in message and "run.json" in message
    message.encode(errors="strict")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, part in (("none", "No such file"), (".", "not a file"), ("pipe", "not a file"), ("a\0b", "bad name")):
        message = refusal(parse, ["--config", f"{tmp_path}/{name}"], CONFIGS, "p")
        assert part in message and "--config" in message
    assert "twice" in refusal(parse, ["--config", "a", "--config=b"], CONFIGS, "p")
    assert "--config" in refusal(parse, ["--config"], CONFIGS, "p")


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "{b: " * 15000,
        "- " * 30000,
        "x: [" + ",".join(["1"] * 30000) + "]",
        "\n".join(f"k{i}: {i}" for i in range(5000)),
        'x: "' + "\\x41" * 15000 + '"',
        "# " * 30000,
        "? " * 30000,
        "a" * 65000,
        "l0: &l0 [x]\n" + "\n".join(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 1000)),
    ],
    ids=["flow", "blocks", "list", "keys", "escapes", "comment", "complex", "word", "laughs"],
)
def test_the_longest_files_are_read_in_seconds(content: str, with_file: Write) -> None:
    started = time.monotonic()
    refusal(with_file, content)
    assert time.monotonic() - started < 20


# ---------------------------------------------------------------- names of other programs


def test_no_foreign_name_is_ours() -> None:
    ours = {item.option for cls in (*SECTIONS.values(), *CONFIGS.values()) for item in flags_of(cls)}
    names = ["--" + entry.name[2:].replace("_", "-") for entry in FOREIGN]
    assert not ours & set(names)
    assert len(set(names)) == len(names), "each name stands once"


@pytest.mark.parametrize("entry", FOREIGN, ids=lambda entry: entry.name)
def test_a_foreign_name_points_to_a_flag_that_exists(entry: Any) -> None:
    classes = (*SECTIONS.values(), *CONFIGS.values())
    ours = {item.option: item for cls in classes for item in flags_of(cls)}
    known = {*ours, *("--no-" + option[2:] for option, item in ours.items() if item.kind is bool)}
    for word in (word.strip(",;") for word in entry.here.split() if word.startswith("--")):
        assert word in known | {"--config", "--ds-config"}, entry
    words = entry.here.split()
    if len(words) == 2 and words[0].startswith("--"):
        choices = (*CONFIGS, "auto") if words[0] in ("--method", "--load") else ours[words[0]].choices
        assert words[1] in choices, entry
