"""The shape of the code: import arrows, fences around libraries, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megalowrank"
LAYERS = [
    {"errors", "quiet", "signals", "__init__"},
    {"config"},
    {"flags", "parallel"},
    {"cli", "lowrank"},
    {"methods", "data"},
    {"models"},
    {"checkpoint"},
    {"engine"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FENCES = {
    "deepspeed": ("engine/",),
    "megatron": ("parallel/groups.py", "lowrank/linear.py", "lowrank/select.py", "models/", "data/tokens.py"),
}
FILES = sorted(PACKAGE.rglob("*.py"))
CODE = (
    FILES
    + sorted(ROOT.glob("*.py"))
    + sorted((ROOT / "tools").glob("*.py"))
    + sorted((ROOT / "benchmarks").glob("*.py"))
)


def imported(path: Path) -> list[str]:
    """Dotted names of all modules that a file imports, wherever the import stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def part(path: Path) -> str:
    """The package part a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = LEVEL[part(path)]
    for name in imported(path):
        if name.startswith("megalowrank."):
            target = name.split(".")[1]
            assert target == part(path) or LEVEL[target] < own, f"{path} must not import {name}"


def test_no_cycles_between_modules() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): [
            n for n in imported(path) if n.startswith("megalowrank.")
        ]
        for path in FILES
    }
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' > '.join((*trail, name))}"
        if name in finished or name not in graph:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", FENCES)
def test_libraries_stay_behind_their_fence(library: str) -> None:
    for path in FILES:
        relative = str(path.relative_to(PACKAGE))
        if any(name.split(".")[0] == library for name in imported(path)):
            assert relative.startswith(FENCES[library]), f"{relative} must not import {library}"


def test_only_one_file_reads_private_attributes_of_deepspeed() -> None:
    names = (
        "_hp_mapping",
        "ds_tensor",
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
    )
    for path in FILES:
        text = path.read_text()
        if path.name not in ("zero_state.py", "memory.py"):
            assert not any(name in text for name in names), path


def test_methods_are_named_only_in_the_registry() -> None:
    for path in FILES:
        if part(path) == "methods" or path.name == "config.py":
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & {"switchlora", "relora", "golore", "galore", "lte", "heterolora"}, path


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 400, "files stay under 400 lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"
            assert depth(node) <= 3, f"{node.name} nests deeper than 3"


def depth(node: ast.AST) -> int:
    """Deepest nesting of loops, conditions, with and try inside a function."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    alternative = node.orelse if isinstance(node, ast.If) else []
    inner = [
        depth(child) - (child in alternative and isinstance(child, ast.If))
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, ast.FunctionDef)
    ]
    return max(inner, default=0) + isinstance(node, blocks)


def test_every_method_states_paper_and_deviations() -> None:
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if 'name = "' in path.read_text():
            assert "Paper:" in text and "Deviations:" in text, path


def test_no_forbidden_file_names() -> None:
    forbidden = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not {path.name for path in FILES} & forbidden
