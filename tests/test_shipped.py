"""What is written down works: every command of README, docs, slurm and Makefile is one that the programs take."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch.distributed.run
from deepspeed.launcher import runner

from megalowrank.cli import parse
from megalowrank.methods import METHODS
from megalowrank.models.architecture import GPT_FAMILIES, LLAMA_FAMILIES
from megalowrank.models.presets import apply_preset
from tests.harness import ROOT, run_program
from tools import search_rank

PROGRAMS = {"pretrain_llama.py": LLAMA_FAMILIES, "pretrain_gpt.py": GPT_FAMILIES}
STARTERS = ("python", "python3", "deepspeed", "torchrun", "srun", "make")
FENCE = re.compile(r"^```(?:sh|bash|shell)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CONFIGS = {name: method.config_class for name, method in METHODS.items()}


def fenced(text: str) -> list[str]:
    """The command lines of the shell blocks of a Markdown text, continuation lines joined."""
    return [line for block in FENCE.findall(text) for line in joined(block)]


def joined(script: str) -> list[str]:
    return [line.strip() for line in script.replace("\\\n", " ").splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    """The words of a command without comments, prompt, and assignments before it; the program as a bare name."""
    words = shlex.split(line, comments=True)
    while words and (words[0] in ("$", "exec") or re.fullmatch(r"\w+=.*", words[0])):
        words.pop(0)
    return [Path(words[0]).name, *words[1:]] if words and not words[0].startswith("tools/") else words


def make(*arguments: str) -> str:
    """What make would do, without doing it, where the environment is installed."""
    command = ["make", "--no-print-directory", "-n", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", *arguments]
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> dict[str, list[str]]:
    """Every command that is written down, by file and line, as words."""
    found = {}
    sources = [(path, fenced(path.read_text())) for path in documents()]
    sources += [(path, joined(path.read_text())) for path in sorted((ROOT / "slurm").glob("*")) if path.is_file()]
    sources += [(ROOT / "Makefile", joined(make("pretrain")))]
    for path, lines in sources:
        for number, line in enumerate(lines):
            words = words_of(line) if not line.startswith("#") else []
            if words and (words[0] in STARTERS or words[0].startswith("tools/")):
                found[f"{path.relative_to(ROOT)}:{number}:{words[0]}"] = words
    return found


COMMANDS = commands()


@cache
def help_of(script: str) -> str:
    return run_program([script, "--help"])


def check_program(program: str, flags: list[str]) -> None:
    """A command line of a program: its flags, the shape of its model, and the DeepSpeed JSON it names."""
    if flags in (["--help"], ["-h"]):
        return
    config = parse(flags, CONFIGS, program)
    assert config.ds_config is not None and (ROOT / config.ds_config).is_file(), "--ds-config"
    apply_preset(config.model, 2000, config.train.seq_length, PROGRAMS[program])
    assert (config.data.data_path or config.data.labelled_data) and config.train.lr


def check_launcher(name: str, options: list[str], script: list[str]) -> None:
    """The launcher's own options, read by the launcher's own parser."""
    if name == "deepspeed":
        found = runner.parse_args([*options, *script])
        assert [found.user_script, *found.user_args] == script
    if name == "torchrun":
        found = torch.distributed.run.get_args_parser().parse_args([*options, *script])
        assert [found.training_script, *found.training_script_args] == script


def check_script(words: list[str]) -> None:
    """A tool or benchmark: it is there, starts, and has all these flags."""
    script, *flags = words
    assert (ROOT / script).is_file(), script
    if script == "tools/search_rank.py":
        known, rest = search_rank.parser().parse_known_args(flags)
        check_program(known.program, [*rest, "--method", "heterolora"])
        return
    known = help_of(script)
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--")):
        assert re.search(rf"{re.escape(flag)}\b", known), f"{script} has no {flag}"


@pytest.mark.parametrize("place", COMMANDS)
def test_a_command_that_is_written_down_is_taken(place: str) -> None:
    words = COMMANDS[place]
    scripts = [at for at, word in enumerate(words) if word.endswith(".py")]
    if words[0] == "make":
        make(*(word for word in words[1:] if not word.startswith("-")))
        return
    if not scripts or "pytest" in words:
        assert words[:2] == ["python", "-m"] or words[0] == "srun", f"{place} starts nothing that is ours"
        return
    start = scripts[0]
    check_launcher(words[0], words[1:start], words[start:])
    program = Path(words[start]).name
    if program in PROGRAMS:
        check_program(program, words[start + 1 :])
    else:
        check_script(words[start:])


def test_the_readme_starts_with_two_commands() -> None:
    lines = fenced((ROOT / "README.md").read_text())
    assert lines[:2] == ["make pretrain", "make test"]
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"install", "pretrain", "test", "check", "clean", "data-enwik8"}
    assert {words_of(line)[1] for line in lines if line.startswith("make")} <= targets


def test_make_pretrain_is_tokens_then_training_then_plots() -> None:
    scripts = [re.findall(r"(\w+\.py)", line)[0] for line in joined(make("pretrain")) if ".py" in line]
    assert scripts == ["prepare_sample.py", "pretrain_llama.py", "plot_run.py"]
    assert "pytest" in make("test") and "mypy" in make("check")
    assert "--train-iters 7 " in make("pretrain", "ITERS=7") and "--num_accelerators 3" in make("pretrain", "RANKS=3")


@pytest.mark.parametrize(
    "script", sorted(p.relative_to(ROOT) for d in ("tools", "benchmarks") for p in (ROOT / d).glob("*.py")), ids=str
)
def test_every_tool_explains_itself(script: Path) -> None:
    assert "usage:" in help_of(str(script))


def test_files_that_are_named_are_there() -> None:
    """Paths in back quotes that begin with a folder of ours."""
    ours = "|".join(("megalowrank", "tests", "tools", "benchmarks", "ds_configs", "docs", "slurm"))
    named = {path: set(re.findall(rf"`((?:{ours})/[\w./]+)`", path.read_text())) for path in documents()}
    missing = {f"{path.name}: {name}" for path, names in named.items() for name in names if not (ROOT / name).exists()}
    assert {place.split(": ")[1] for place in missing} <= {"megalowrank/methods/yours.py"}
