"""Images and printed ranks of a made-up run whose change of weights has a known rank."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.write import SoloRanks, save_checkpoint
from megalowrank.lowrank.fold import split_residual
from megalowrank.parallel.rng import generator

ROOT = Path(__file__).resolve().parents[2]
SEED, STD, RANK, ALPHA = 7, 0.02, 4, 2.0
SHAPES = {
    "attention.q": (32, 32), "attention.k": (16, 32), "attention.v": (16, 32), "attention.o": (32, 32),
    "mlp.gate": (48, 32), "mlp.up": (48, 32), "mlp.down": (32, 48),
}  # fmt: skip
RANKS = {"q": 11, "k": 3, "v": 16, "o": 9, "gate": 32, "up": 1, "down": 7}


def change_of(kind: str, shape: tuple[int, int], source: torch.Generator) -> torch.Tensor:
    """A matrix with RANKS[kind] singular values from 1 down to 0.05, and none besides."""
    rank = RANKS[kind]
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=source, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=source, dtype=torch.float64))[0]
    return left * torch.logspace(0, -1.3, rank, dtype=torch.float64) @ right.t()


def pieces(blocks: int, method: str, residual: bool) -> list[Piece]:
    """A checkpoint as the trainer saves it, whose effective weights moved by ``change_of``."""
    source, found = torch.Generator().manual_seed(0), []
    for block in range(blocks):
        for part, shape in SHAPES.items():
            name = f"layers.{block}.{part}"
            drawn = torch.empty(shape).normal_(0.0, STD, generator=generator(SEED, f"{name}.weight"))
            end = drawn.double() + change_of(part.split(".")[1], shape, source)
            if method == "full":
                found.append(Piece.whole(f"master/{name}.weight", end.float()))
                continue
            a, b = (torch.randn(RANK, size, generator=source) for size in (shape[1], shape[0]))
            weight = (end - ALPHA / RANK * b.double().t() @ a.double()).float()
            if residual:
                weight, low = split_residual(weight, torch.int16)
                found.append(Piece.whole(f"residual/{name}.weight", low))
            found.append(Piece.whole(f"weight/{name}.weight", weight))
            found += [Piece.whole(f"master/{name}.A", a), Piece.whole(f"master/{name}.B", b)]
    return found


def make_run(folder: Path, method: str = "switchlora", residual: bool = True, save: Path | None = None) -> dict:
    """run.json and metrics.jsonl of 400 updates; returns the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "model": {"num_layers": 3, "hidden_size": 32, "init_method_std": STD, "preset": None},
        "train": {"seed": SEED, "bf16": residual},
        "method": method,
        "method_config": {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_init": "switchlora"},
        "unigram_loss": 6.4,
        "data": {},
        "output": {"save": None if save is None else str(save)},
    }
    if method == "full":
        config["method_config"] = {}
    noise = np.random.default_rng(0).normal(size=400)
    lines = []
    for step in range(0, 4000, 10):
        loss = 3.2 + 6 * np.exp(-step / 500) + 0.08 * noise[step // 10]
        record = {"step": step, "loss": loss if step != 500 else None, "lr": 1e-3 * min(1, step / 400)}
        if method == "switchlora":
            record["switched_vectors"] = int(120 * 0.3 ** (step / 1000))
        lines.append(record)
        if step % 400 == 390:
            lines.append({"step": step, "eval_loss": 3.25 + 6 * np.exp(-step / 500)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(config))
    return config


@dataclass(frozen=True)
class Outcome:
    returncode: int
    stdout: str
    stderr: str


class Plot:
    """Calls the tool in this process, as ``python tools/plot_run.py ARGUMENTS`` would run it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        spec = importlib.util.spec_from_file_location("plot_run", ROOT / "tools" / "plot_run.py")
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "plot_run", self.module)
        spec.loader.exec_module(self.module)

    def part(self, name: str) -> Any:
        """A module behind the tool."""
        return importlib.import_module(f"plotting.{name}")

    def __call__(self, *arguments: Path | str) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
        code = 0
        try:
            self.module.run_main(self.module.main)
        except SystemExit as left:
            code = int(left.code or 0)
        return Outcome(code, *self.capsys.readouterr())


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plot:
    return Plot(monkeypatch, capsys)


def plot_in_a_process(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH="")
    command = [sys.executable, str(ROOT / "tools" / "plot_run.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)


def ranks_in(output: str) -> dict[str, int]:
    return {name: int(rank) for name, rank in re.findall(r"^(layers\S+): effective rank (\d+) of", output, re.M)}


def check_image(path: Path) -> None:
    """A picture with some hundred distinct colours that is mostly background."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 400_000
    assert len(np.unique(pixels, axis=0)) > 50
    background = (pixels == 255).all(1).mean()
    assert 0.3 < background < 0.99


@pytest.mark.parametrize(("method", "residual"), [("switchlora", True), ("full", False)])
def test_draws_all_images_and_finds_the_known_ranks(tmp_path: Path, plot: Plot, method: str, residual: bool) -> None:
    run, saved = tmp_path / "run", tmp_path / "checkpoints"
    make_run(run, method, residual, saved)
    save_checkpoint(saved, 4000, pieces(3, method, residual), {}, SoloRanks())
    result = plot(run)
    assert result.returncode == 0, result.stderr
    expected = {
        f"layers.{block}.{part}": RANKS[part.split(".")[1]] for block in (0, 2) for part in SHAPES
    }  # fmt: skip
    assert ranks_in(result.stdout) == expected
    images = {"loss.png", "schedule.png", "spectrum.png"} | ({"switches.png"} if method == "switchlora" else set())
    assert {path.name for path in run.glob("*.png")} == images
    for image in images:
        check_image(run / image)


def test_ranks_of_lora_in_float32(tmp_path: Path, plot: Plot) -> None:
    run, saved = tmp_path / "run", tmp_path / "checkpoints"
    make_run(run, "lora", False, saved)
    save_checkpoint(saved, 4000, pieces(1, "lora", False), {}, SoloRanks())
    read = plot.module.Run.read(run)
    found = dict(plot.part("spectrum").spectra(read, plot.module.find_checkpoint(read, None)))
    assert {n.split(".")[-1]: plot.part("spectrum").effective_rank(values) for n, values in found.items()} == RANKS
    np.testing.assert_allclose(found["layers.0.attention.q"][:11], np.logspace(0, -1.3, 11), rtol=1e-5)


def test_a_run_that_did_not_move_has_rank_0(tmp_path: Path, plot: Plot) -> None:
    make_run(tmp_path, "full", False)
    drawn = torch.empty(8, 6).normal_(0.0, STD, generator=generator(SEED, "layers.0.attention.q.weight"))
    save_checkpoint(tmp_path, 0, [Piece.whole("master/layers.0.attention.q.weight", drawn)], {}, SoloRanks())
    result = plot(tmp_path, "--checkpoint", tmp_path)
    assert result.returncode == 0, result.stderr
    assert ranks_in(result.stdout) == {"layers.0.attention.q": 0}


def test_smoothing_is_a_centred_mean(plot: Plot) -> None:
    values = np.random.default_rng(1).normal(size=300)
    smooth = plot.part("style").smooth(values)
    for i, half in ((0, 0), (1, 1), (150, 3), (298, 1)):
        assert smooth[i] == pytest.approx(values[i - half : i + half + 1].mean())


def test_a_given_checkpoint_and_folder_win(tmp_path: Path) -> None:
    run, saved, out = tmp_path / "run", tmp_path / "other", tmp_path / "deep" / "images"
    make_run(run, save=tmp_path / "never")
    save_checkpoint(saved, 8, pieces(1, "switchlora", True), {}, SoloRanks())
    result = plot_in_a_process(run, "--checkpoint", saved / "step_00000008", "--out", out)
    assert result.returncode == 0, result.stderr
    assert len(ranks_in(result.stdout)) == 7
    assert (out / "spectrum.png").exists() and not list(run.glob("*.png"))


def test_bad_input_is_one_line_and_code_2(tmp_path: Path, plot: Plot) -> None:
    run = tmp_path / "run"
    config = make_run(run)
    cases: dict[str, Any] = {
        "missing": plot_in_a_process(tmp_path / "nothing"),
        "checkpoint": plot(run, "--checkpoint", tmp_path / "gone"),
    }
    saved = tmp_path / "checkpoints"
    save_checkpoint(saved, 1, pieces(1, "switchlora", True), {}, SoloRanks())
    config["method_config"]["lora_rank"] = RANK + 1
    (run / "run.json").write_text(json.dumps(config))
    cases["does not fit"] = plot(run, "--checkpoint", saved)
    (run / "run.json").write_text("[1")
    cases["is not JSON"] = plot(run)
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n\x00\x01\n{"step": 2, "loss": 2.0}\n')
    cases["line 2"] = plot(run)
    for what, result in cases.items():
        assert result.returncode == 2, what
        assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    for what in ("does not fit", "is not JSON", "line 2"):
        assert what in cases[what].stderr


# ---------------------------------------------------------------- several runs


def make_record_run(folder: Path, method: str, fields: dict[str, float], updates: int = 40) -> Path:
    """A run whose loss falls by 0.01 per update from 4, evaluated every 10 updates at 0.5 more."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, updates + 1):
        lines.append({"step": step, "loss": 4 - step / 100, **{key: step * value for key, value in fields.items()}})
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 4.5 - step / 100 + (step == updates) / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"method": method, "model": {"preset": "llama_9m"}}))
    return folder


ALL_FIELDS = {"lr": 1e-3, "tokens": 1000.0, "tokens_per_second": 10.0, "memory_bytes": 2.0**25}


def test_runs_are_compared(tmp_path: Path, plot: Plot) -> None:
    first = make_record_run(tmp_path / "a" / "run", "full", ALL_FIELDS)
    second = make_record_run(tmp_path / "b" / "run", "lora", {"lr": 1e-2}, 20)
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    result = plot(first, second, first)
    assert result.returncode == 0, result.stderr
    out = result.stdout.splitlines()
    assert out[:2] == [
        "b/run: the last line of metrics.jsonl is cut and left out",
        "b/run: no tokens_per_second, memory_bytes in metrics.jsonl",
    ]
    assert [line.split() for line in out[2:6]] == [
        ["run", "method", "updates", "tokens", "loss", "held-out", "best", "held-out", "tokens/s", "GiB"],
        ["a/run", "(1)", "full", "40", "4e+04", "3.6150", "4.6000", "4.2000", "205", "1.25"],
        ["b/run", "lora", "20", "-", "3.8050", "4.8000", "4.4000", "-", "-"],
        ["a/run", "(2)", "full", "40", "4e+04", "3.6150", "4.6000", "4.2000", "205", "1.25"],
    ]
    assert out[6:] == [f"wrote {first / 'comparison.png'}"]
    check_image(first / "comparison.png")
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", "run.json", "comparison.png"}


def test_a_comparison_draws_the_numbers(tmp_path: Path, plot: Plot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the axes: updates or tokens across, the units of the labels up."""
    runs = [make_record_run(tmp_path / name, "full", ALL_FIELDS) for name in "ab"]
    compare, kept = plot.part("compare"), []
    monkeypatch.setattr(compare, "save", lambda figure, path: kept.append(figure))
    for x, scale in (("updates", 1), ("tokens", 1000)):
        assert plot(*runs, "--x", x, "--out", tmp_path / "out").returncode == 0
        axes = kept.pop().axes
        assert [len(ax.get_lines()) for ax in axes[:5]] == [2] * 5
        held_out, memory = axes[1].get_lines()[0], axes[4].get_lines()[1]
        np.testing.assert_allclose(held_out.get_xdata(), np.array([10, 20, 30, 40]) * scale)
        np.testing.assert_allclose(held_out.get_ydata(), [4.4, 4.3, 4.2, 4.6])
        np.testing.assert_allclose(memory.get_ydata(), np.arange(1, 41) / 32)
        texts = [text.get_text() for text in axes[5].get_legend().get_texts()]
        assert texts == ["a: full, llama_9m", "b: full, llama_9m"] and axes[0].get_xlabel() == x


def test_names_tell_runs_apart(tmp_path: Path, plot: Plot) -> None:
    names = plot.part("compare").labels
    assert names([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert names([Path("/x/a/r"), Path("/y/a/r"), Path("/y/b/r")]) == ["x/a/r", "y/a/r", "y/b/r"]
    assert names([Path("/r"), Path("/a/r")]) == ["//r", "a/r"]
    assert names([Path("/a"), Path("/a")]) == ["a (1)", "a (2)"]


def test_a_comparison_that_cannot_be_is_one_line(tmp_path: Path, plot: Plot) -> None:
    good, bare = (make_record_run(tmp_path / name, "full", {}) for name in "ab")
    (tmp_path / "none").mkdir()
    (tmp_path / "no_metrics").mkdir()
    (tmp_path / "no_metrics" / "run.json").write_text("{}")
    empty = make_record_run(tmp_path / "empty", "full", {}, 0)
    for words, part in (
        ((good, tmp_path / "none"), "none/run.json: No such file"),
        ((good, tmp_path / "no_metrics"), "no_metrics/metrics.jsonl: No such file"),
        ((good, empty), "empty/metrics.jsonl has no update with a loss"),
        ((good, bare, "--x", "tokens"), "does not count tokens; allowed: --x updates"),
        ((good, bare, "--checkpoint", tmp_path), "--checkpoint belongs to one run"),
    ):
        result = plot(*words)
        assert result.returncode == 2 and part in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_the_heat_map_has_a_square_for_every_module_and_reallocation(
    tmp_path: Path, plot: Plot, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, values, **_: drawn.append(values))
    modules = importlib.import_module("plotting.modules")
    names = ["layers.10.mlp.down", "layers.2.attention.v", "layers.2.attention.q", "layers.2.shortcut.cross_in"]
    on = ([0, 1], [1], [1, 3])
    records = [{"step": 20, "loss": 1.0}, {"step": 30, "event": "reallocation", "kept": "a score is not finite"}]
    for at, chosen in enumerate(on):
        sides = {"on": {names[i]: 1.0 for i in chosen}, "off": {n: 0.0 for i, n in enumerate(names) if i not in chosen}}
        records.append({"step": 10 * at, "event": "reallocation", **sides})
    run = importlib.import_module("plotting.run").Run(tmp_path, {}, records)
    monkeypatch.setattr(type(run), "title", "a run", raising=False)
    modules.draw_modules(run, tmp_path)
    assert (tmp_path / "modules.png").stat().st_size > 1000
    in_order = (2, 1, 3, 0)
    assert drawn[0].tolist() == [[i in chosen for chosen in on] for i in in_order]
