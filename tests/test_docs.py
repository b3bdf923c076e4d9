"""docs/flags.md says what the programs take, and the packaging files agree with each other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import megalowrank
from megalowrank.cli import SECTIONS, parse
from megalowrank.flags.fields import flags_of
from megalowrank.flags.names import FOREIGN
from megalowrank.methods import METHODS
from tests.harness import ROOT

FLAGS = ROOT / "docs" / "flags.md"
CONFIGS = {name: method.config_class for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_flags_doc", ROOT / "tools" / "make_flags_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_doc_is_up_to_date(tool: ModuleType) -> None:
    assert FLAGS.read_text() == tool.document(), "run python tools/make_flags_doc.py"


def test_layouts_doc_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_layouts_doc.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-300:]


def test_every_flag_and_every_name_has_its_line() -> None:
    lines = FLAGS.read_text().splitlines()
    for cls in (*SECTIONS.values(), *CONFIGS.values()):
        for item in flags_of(cls):
            assert any(line.startswith(f"| `{item.option}` |") and item.help.split("|")[0] in line for line in lines)
    assert all(f"| `{entry.name}` | {entry.source} |" in FLAGS.read_text() for entry in FOREIGN)
    assert "| `--lora-rank` | whole number | `128` |  | rank r of every adapted matrix |" in lines
    assert "| `--seq-length` | whole number | `512` | tokens | length of a sample |" in lines


def test_check_says_when_the_file_is_old(tmp_path: Path) -> None:
    """In a process, as a user and CI start it."""
    old, command = tmp_path / "flags.md", [sys.executable, str(ROOT / "tools" / "make_flags_doc.py"), "--out"]
    old.write_text(FLAGS.read_text() + "more\n")
    done = subprocess.run([*command, str(old), "--check"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is out of date; allowed: python tools/make_flags_doc.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and old.read_text().endswith("more\n")


def test_the_example_in_the_text_is_a_configuration(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", FLAGS.read_text(), re.DOTALL)
    (tmp_path / "a.yaml").write_text(example)
    found = parse(["--config", str(tmp_path / "a.yaml")], CONFIGS, "p")
    assert (found.model.preset, found.train.lr, found.ds_config) == ("llama_60m", 2e-2, "ds_configs/zero2.json")
    assert found.method_config.lora_target == ["q", "k", "v", "o"]


# ---------------------------------------------------------------- packaging

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> dict[str, set[str]]:
    """Pinned versions by name, of requirements.txt."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        found.setdefault(name.lower(), set()).add(version)
    return found


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "megalowrank.__version__"}
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[0] == megalowrank.__version__ and newest == sorted(newest, reverse=True)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == megalowrank.__version__


def test_pins_are_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    project, pins = PROJECT["project"], requirements()
    extras = [line for name in ("plot", "dev") for line in project["optional-dependencies"][name]]
    for line in [*project["dependencies"], *extras]:
        wanted = Requirement(line)
        if wanted.name == "megalowrank":
            continue
        if wanted.name == "torch":
            assert "2.13.0" in wanted.specifier and "2.5.1" not in wanted.specifier
            continue
        assert pins.get(wanted.name.lower()), f"requirements.txt pins no {wanted.name}"
        assert all(version in wanted.specifier for version in pins[wanted.name.lower()]), line


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in PROJECT["project"]["dependencies"]}
    named = {"yaml": "pyyaml", "megatron": "megatron-core"}
    optional = {"wandb", "apex", "peft", "datasets", "pyarrow", "huggingface_hub"}
    for path in (ROOT / "megalowrank").rglob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE):
            known = name in sys.stdlib_module_names or name in optional or name == "megalowrank"
            assert known or named.get(name, name) in declared, f"{path}: {name}"


def test_citation_has_the_papers() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"title", "authors", "message", "license"} <= cited.keys()
    titles = " ".join(entry["title"] for entry in cited["references"])
    for name in ("SwitchLoRA", "ReLoRA", "GaLore", "Parallel Low-Rank Adapters", "Synergies", "ZeRO", "Megatron-LM"):
        assert name in titles
    assert all({"type", "authors", "year"} <= entry.keys() for entry in cited["references"])
