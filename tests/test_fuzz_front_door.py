"""Whatever is typed or stands in a file: a configuration, or one line that refuses it; and nothing is written.

``FUZZ=10`` tries ten times as many cases; ``--hypothesis-show-statistics`` counts them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from megalowrank.cli import SECTIONS, RunConfig, parse
from megalowrank.engine.dsconfig import Resolved, resolve
from megalowrank.engine.dskeys import TOP_LEVEL, ZERO
from megalowrank.engine.metrics import MetricsWriter, read_metrics
from megalowrank.errors import ConfigError
from megalowrank.flags.fields import Flag, flags_of
from megalowrank.flags.names import FOREIGN
from megalowrank.methods import METHODS
from tests.harness import ROOT

CONFIGS = {name: method.config_class for name, method in METHODS.items()}
FLAGS = {item.name: item for cls in (*SECTIONS.values(), *CONFIGS.values()) for item in flags_of(cls)}
SCALE = int(os.environ.get("FUZZ", "1"))


def cases(number: int) -> Any:
    """Settings of one property: no deadline of its own, because the machine may be busy; pytest has a timeout."""
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    return settings(max_examples=number * SCALE, deadline=None, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What ``call`` returns, or None if it refuses properly."""
    try:
        found = call(*arguments)
        event("accepted")
        return found
    except ConfigError as error:
        event("refused")
        line = str(error)
        assert 3 < len(line) < 2000
        " ".join(line.split()).encode(errors="backslashreplace")
        return None


# ---------------------------------------------------------------- values and keys

ODD = st.sampled_from(
    ["", " ", "-", "--", "-1", "0", "1e999", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "0x10", "1_000", "٣", "1e-4",
     "true", "null", "a=b", "%s", "%(prog)s", "{}", "\x00", "\n", "\ud800", "é" * 300, "~", "!!python/none", "*x", "..",
     "/dev/zero", "auto", "switchlora", "full", "\u2028", "@file", "-h=1"],
)  # fmt: skip
WORDS = st.one_of(ODD, st.text(max_size=12), st.integers().map(str), st.floats().map(str))


def fitting(item: Flag) -> st.SearchStrategy[Any]:
    """Mostly values of the right kind, in and out of range."""
    if item.choices:
        return st.sampled_from(item.choices)
    if item.name == "method":
        return st.sampled_from(list(CONFIGS))
    return {
        bool: st.booleans(),
        int: st.integers(-3, 3000),
        float: st.floats(-1, 100),
        str: st.text(max_size=8),
        list: st.lists(st.sampled_from(["q", "k", "*", "up"]), max_size=3),
    }[item.kind]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ODD, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def typed(draw: st.DrawFn) -> list[str]:
    """One flag with what follows it: right, slightly wrong, foreign or nonsense."""
    name = draw(st.sampled_from([*FLAGS, "config", "ds_config", "deepspeed", "local_rank"]))
    item = FLAGS.get(name)
    flag = "--" + (name.replace("_", "-") if draw(st.booleans()) else name)
    values = fitting(item) if item is not None and draw(st.integers(0, 3)) else WORDS
    value = draw(values)
    return draw(
        st.sampled_from(
            [
                [flag, str(value)], [f"{flag}={value}"], [flag], ["--no-" + name], [flag[:-1], "1"],
                [flag, *map(str, value if isinstance(value, list) else [value, value])], [str(value)],
                [draw(st.sampled_from(FOREIGN)).name, "1"], ["--" + draw(WORDS)], [draw(WORDS)],
            ]
        )
    )  # fmt: skip


def parsed(words: list[str]) -> RunConfig | None:
    """``--help`` leaves with 0, as it should."""
    try:
        return outcome(parse, words, CONFIGS, "pretrain_llama.py")
    except SystemExit as left:
        assert left.code == 0 and any(word.startswith("-h") or word == "--help" for word in words)
        return None


@cases(600)
@given(st.lists(typed(), max_size=6))
def test_any_command_line(folder: Path, groups: list[list[str]]) -> None:
    before = sorted(folder.iterdir())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        found = parsed([word for group in groups for word in group])
    assert found is None or isinstance(found, RunConfig)
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------- configuration files


@st.composite
def keys_and_values(draw: st.DrawFn, deep: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(list(FLAGS)), max_size=5)):
        key = name.replace("_", "-") if draw(st.integers(0, 4)) == 0 else name
        found[key] = draw(fitting(FLAGS[name]) if draw(st.integers(0, 4)) else JSON)
    if deep:
        extra = ["deepspeed", "ds_config", "versions", "world_size", "local_rank", "config", "method"]
        for name in draw(st.lists(st.sampled_from([*SECTIONS, "method_config", *extra]), max_size=3)):
            found[name] = draw(st.one_of(keys_and_values(deep=False), JSON))
    return found


RUN_JSON = (
    json.dumps(
        {name: {item.name: item.default for item in flags_of(cls)} for name, cls in SECTIONS.items()}
        | {"method": "switchlora", "method_config": {"lora_rank": 8}, "deepspeed": {"train_batch_size": 8}}
        | {"world_size": 2, "versions": {"megalowrank": "0.1.0"}}
    )
).encode()


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """A file with a piece taken out, doubled or replaced."""
    first, last = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    piece = draw(st.one_of(st.just(b""), st.binary(max_size=6), st.just(text[first:last] * 2), ODD.map(_bytes)))
    return text[:first] + piece + text[min(last, first + draw(st.integers(0, 40))) :]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


CONTENTS = st.one_of(
    keys_and_values().map(lambda value: _bytes(json.dumps(value))),
    keys_and_values().map(lambda value: _bytes(yaml.safe_dump(value, allow_unicode=True))),
    damaged(RUN_JSON),
    damaged(b"preset: llama_9m\ntrain:\n  lr: 1e-2 # x\n  bf16: true\nlora_target: [q, 'k', \"v\"]\n? a\n: b\n"),
    st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?\n \t0e.~<=\\", max_size=60).map(_bytes),
    st.binary(max_size=80),
)


@cases(800)
@given(CONTENTS, st.sampled_from(["run.json", "run.yaml"]), st.lists(typed(), max_size=1))
def test_any_configuration_file(folder: Path, content: bytes, name: str, words: list[list[str]]) -> None:
    (folder / name).write_bytes(content)
    before = sorted(folder.iterdir())
    found = parsed(["--config", str(folder / name), *(word for group in words for word in group)])
    assert found is None or isinstance(found, RunConfig)
    assert sorted(folder.iterdir()) == before and (folder / name).read_bytes() == content


@cases(200)
@given(st.data())
def test_a_file_says_the_same_as_the_flags(folder: Path, data: st.DataObject) -> None:
    """Right values of flags of any section: YAML, JSON and the command line give one configuration, or one refusal."""
    method = data.draw(st.sampled_from(list(CONFIGS)))
    known = [item for cls in (*SECTIONS.values(), CONFIGS[method]) for item in flags_of(cls)]
    chosen = data.draw(st.lists(st.sampled_from(known), max_size=6, unique_by=lambda item: item.name))
    values = {item.name: data.draw(fitting(item).filter(lambda v: v not in ([], "\x00"))) for item in chosen}
    values["method"] = method
    if any(isinstance(value, str) and ("\0" in value or value.startswith("-")) for value in values.values()):
        return
    words = [word for name, value in values.items() for word in as_words(FLAGS[name], value)]
    (folder / "same.json").write_text(json.dumps(values))
    (folder / "same.yaml").write_text(yaml.safe_dump(values))
    typed_in = parsed(words)
    for file in ("same.json", "same.yaml"):
        read = parsed(["--config", str(folder / file)])
        assert (read is None) == (typed_in is None)
        assert read is None or read == typed_in


def as_words(item: Flag, value: Any) -> list[str]:
    if item.kind is bool:
        return [item.option if value else "--no-" + item.option[2:]]
    return [item.option, *map(str, value)] if item.kind is list else [f"{item.option}={value}"]


# ---------------------------------------------------------------- DeepSpeed JSON and metrics files


@cases(400)
@given(st.data())
def test_any_deepspeed_json(folder: Path, data: st.DataObject) -> None:
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    if data.draw(st.booleans()):
        content = data.draw(damaged(data.draw(st.sampled_from(shipped)).read_bytes()))
    else:
        zero = data.draw(st.dictionaries(st.sampled_from(list(ZERO)), JSON, max_size=3))
        top = data.draw(st.dictionaries(st.sampled_from(list(TOP_LEVEL)), JSON, max_size=3))
        content = _bytes(json.dumps(top | {"zero_optimization": zero | {"stage": data.draw(st.integers(0, 3))}}))
    path = folder / "ds.json"
    path.write_bytes(content)
    config = parse(["--lr", "1e-3", "--micro-batch-size", "2"], CONFIGS, "p")
    found = outcome(resolve, str(path), config.train, config.given, 2, 128)
    assert found is None or isinstance(found, Resolved)


LINES = st.one_of(
    st.builds(lambda step, loss: _bytes(json.dumps({"step": step, "loss": loss})), st.integers(0, 99), JSON),
    JSON.map(lambda value: _bytes(json.dumps(value))),
    st.binary(max_size=20),
    st.just(b'{"step": 1}'),
)


@cases(400)
@given(st.lists(LINES, max_size=5), st.integers(0, 30), st.integers(0, 100))
def test_any_metrics_file(folder: Path, lines: list[bytes], cut: int, step: int) -> None:
    """Read, cut back to a step and written on: all of it, or a refusal that leaves the file as it was."""
    path = folder / "metrics.jsonl"
    content = b"\n".join([*lines, b""])
    content = content[: max(0, len(content) - cut)]
    path.write_bytes(content)
    records = outcome(read_metrics, path)
    writer = MetricsWriter(path, True)
    outcome(writer.truncate_from, step)
    if records is None:
        assert path.read_bytes() == content
        return
    kept = [record for record in records if record["step"] < step]
    assert read_metrics(path) == kept
    writer.write({"step": step})
    writer.close()
    assert read_metrics(path) == [*kept, {"step": step}]
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []
