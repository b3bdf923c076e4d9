"""The inspector: what it says of small checkpoints, the damage it finds, and what it finds different."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from megalowrank.checkpoint.pieces import Piece
from megalowrank.errors import run_main
from tests.checkpoint.io_cases import save_together
from tests.front_door_cases import finish, start
from tests.harness import ROOT

RUN = {
    "method": "lora",
    "method_config": {"lora_rank": 2, "lora_alpha": 3.0},
    "model": {"num_layers": 1, "hidden_size": 5, "vocab_size": None},
    "train": {"global_batch_size": 4, "seq_length": 8, "bf16": True},
    "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
    "deepspeed": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "versions": {"megalowrank": "9.8.7"},
}
STATE = {"attempts": 13, "updates": 12, "method_state": {"merges": 1}, "run": RUN}
Tool = Callable[..., tuple[int, str, str]]


def tensors() -> dict[str, torch.Tensor]:
    """A model of one adapted matrix [7, 5] and a norm."""
    generator = torch.Generator().manual_seed(3)
    drawn = {
        "weight/m.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "residual/m.weight": torch.randint(-9, 9, (7, 5), generator=generator).to(torch.int8),
        "clock/m.A": torch.arange(2),
        "pool/m.A": torch.randn(4, 5, generator=generator),
    }
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for name, shape in (("m.A", (2, 5)), ("m.B", (2, 7)), ("norm", (5,))):
            drawn[f"{kind}/{name}"] = torch.randn(shape, generator=generator)
    drawn["master/norm"][:2] = 0.0
    return drawn


def save(root: Path, held: dict[str, torch.Tensor], world: int = 1, step: int = 12, state: Any = STATE) -> Path:
    """Saved by ranks that hold a fragment, or rows, of every tensor."""
    ranks: list[list[Piece]] = [[] for _ in range(world)]
    for number, (name, tensor) in enumerate(held.items()):
        cuts = [tensor.numel() * rank // world for rank in range(world + 1)]
        for rank, pieces in enumerate(ranks):
            if number % 2:
                pieces.append(Piece.rows(name, tensor.shape, rank, world, tensor[rank::world]))
            else:
                part = tensor.reshape(-1)[cuts[rank] : cuts[rank + 1]]
                pieces.append(Piece.fragment(name, tensor.shape, cuts[rank], part))
    assert save_together(root, step, ranks, state) == [root / f"step_{step:08d}"] * world
    return root / f"step_{step:08d}"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("inspect_checkpoint")


@pytest.fixture
def tool(module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The command line in this process: exit code, output, errors."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, words)])
        code = 0
        try:
            run_main(module.main)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return (code, *capsys.readouterr())

    return call


def found(tool: Tool, *words: object, code: int = 0) -> dict[str, Any]:
    ended, out, err = tool(*words, "--json")
    assert (ended, err) == (code, "")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_in_a_checkpoint(tool: Tool, tmp_path: Path, world: int) -> None:
    folder = save(tmp_path, tensors(), world)
    said = found(tool, tmp_path)
    assert said == found(tool, folder) and said["path"] == str(folder)
    assert (said["step"], said["attempts"], said["tokens"], said["verified"]) == (12, 13, 13 * 32, True)
    assert (said["method"], said["method_config"], said["model"]["hidden_size"]) == ("lora", RUN["method_config"], 5)
    assert said["layout"] == {
        "ranks": world, "tensor": 2, "pipeline": 1, "data": world // 2, "zero": 1, "offload": ["offload_optimizer"],
        "bf16": True,
    }  # fmt: skip
    assert said["files"] == {path.name: path.stat().st_size for path in sorted(folder.glob("rank_*"))}
    loaded = [safetensors.torch.load_file(path) for path in folder.glob("rank_*")]
    sizes: dict[str, int] = {}
    for key, tensor in ((key, tensor) for file in loaded for key, tensor in file.items()):
        kind = key.split("/")[0]
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    assert {kind: it["bytes"] for kind, it in said["kinds"].items()} == sizes
    assert said["parameters"] == 35 + 5, "the matrix and the norm, without factors"
    assert said["kinds"]["master"] == {
        "tensors": 3, "elements": 29, "bytes": 116, "bytes_per_parameter": pytest.approx(116 / 40),
    }  # fmt: skip
    assert said["bytes_per_parameter"] == pytest.approx(sum(said["files"].values()) / 40)
    text = tool(tmp_path)[1]
    for words in ("12 updates, 1 skipped, 416 tokens", "lora (lora_rank 2", f"{world} rank(s): tensor 2", "9.8.7"):
        assert words in text
    assert "rank_00000.safetensors" in text and "exp_avg_sq" in text and "2.900" in text and "verified" in text


def test_any_checkpoint_is_shown(tool: Tool, tmp_path: Path) -> None:
    """Of a run that says nothing, and with a tensor of no kind."""
    save(tmp_path, {"count": torch.tensor([5, 6])}, state={"other": 1})
    assert found(tool, tmp_path)["kinds"]["other"]["bytes"] == 16
    assert "12 updates" in tool(tmp_path)[1]


@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_values_of_tensors(module: ModuleType, tool: Tool, tmp_path: Path, chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules["inspecting.facts"], "_CHUNK", chunk)
    held = tensors()
    held["pool/m.A"].view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    held["exp_avg/norm"][:] = math.nan
    save(tmp_path, held, 2)
    said = found(tool, tmp_path, "--tensors")["tensors"]
    assert said.keys() == held.keys()
    for name, tensor in held.items():
        values = tensor.double()[tensor.double().isfinite()]
        it = said[name]
        assert (it["shape"], f"torch.{it['dtype']}") == (list(tensor.shape), str(tensor.dtype))
        assert it["not_finite"] == tensor.numel() - values.numel()
        assert it["norm"] == pytest.approx(float(values.norm()), rel=1e-12)
        assert it["zeros"] == int((tensor == 0).sum()) / tensor.numel()
        assert (it["min"], it["max"]) == ((values.min(), values.max()) if values.numel() else (None, None))
    assert said["master/norm"]["zeros"] == 0.4 and said["pool/m.A"]["not_finite"] == 3
    assert found(tool, tmp_path, "--tensors", "master/*.A")["tensors"].keys() == {"master/m.A"}
    assert "40.00 %" in tool(tmp_path, "--tensors", "*norm")[1]


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "rank_00001.safetensors", "manifest.json"])
def test_one_flipped_bit_is_found_by_name(tool: Tool, tmp_path: Path, file: str) -> None:
    good, folder = save(tmp_path / "good", tensors(), 2), save(tmp_path / "bad", tensors(), 2)
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 8
    (folder / file).write_bytes(data)
    for words in ([folder], [tmp_path / "bad"], [tmp_path / "bad", "--tensors"], [good, folder], [folder, good]):
        code, out, err = tool(*words)
        assert (code, out) == (1, "") and err.startswith("damaged: ") and str(folder / file) in err
    assert file in found(tool, folder, code=1)["error"]
    assert tool(folder, "--no-verify")[0] == (1 if file == "manifest.json" else 0), "only sizes are looked at"


@pytest.mark.parametrize("file", ["rank_00001.safetensors", "manifest.json", "manifest.sha256"])
def test_what_is_cut_or_gone_is_never_fine(tool: Tool, tmp_path: Path, file: str) -> None:
    folder = save(tmp_path, tensors(), 2)
    for content in ((folder / file).read_bytes()[:9], b""):
        (folder / file).write_bytes(content)
        for more in ([], ["--no-verify"]):
            code, _, err = tool(folder, *more)
            assert code == 1 and str(folder) in err and file in err
    (folder / file).unlink()
    assert tool(tmp_path)[0] == 1 and str(folder / file) in tool(tmp_path, "--no-verify")[2]


def test_all_of_a_folder(tool: Tool, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, tensors(), 2, step)
    said = found(tool, tmp_path, "--all")
    assert [entry["name"] for entry in said["checkpoints"]] == ["step_00000015", "step_00000010", "step_00000005"]
    assert [entry["latest"] for entry in said["checkpoints"]] == [True, False, False]
    sizes = [path.stat().st_size for path in (tmp_path / "step_00000010").glob("rank_*")]
    assert (said["checkpoints"][1]["ranks"], said["checkpoints"][1]["bytes"]) == (2, sum(sizes))
    path = tmp_path / "step_00000010" / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = tool(tmp_path, "--all")
    assert code == 1 and "step_00000010" in out and f"DAMAGED: {path} is damaged" in out
    assert out.count("intact") == 2 and "intact, latest" in out
    (tmp_path / "latest").write_text("step_1")
    assert found(tool, tmp_path, "--all", code=1)["intact"] is False


# ---------------------------------------------------------------- two compared


@pytest.mark.parametrize(("one", "other"), [(1, 1), (1, 2), (3, 2)])
def test_equal_under_any_layout(tool: Tool, tmp_path: Path, one: int, other: int) -> None:
    held = tensors()
    held["master/norm"][3] = math.nan
    moved = {**STATE, "run": {**RUN, "output": {"save": "elsewhere"}}}
    save(tmp_path / "one", held, one)
    save(tmp_path / "other", held, other, state=moved)
    code, out, _ = tool(tmp_path / "one", tmp_path / "other")
    assert code == 0 and out == f"{len(held)} of {len(held)} tensors in both are equal bit by bit\n"


@pytest.mark.parametrize("name", list(tensors()))
def test_exactly_the_changed_tensor_is_named(tool: Tool, tmp_path: Path, name: str) -> None:
    """One element is changed by one."""
    held = tensors()
    save(tmp_path / "one", held, 1)
    changed = held[name].clone()
    changed.view(-1)[-1] += 1
    save(tmp_path / "other", {**held, name: changed}, 2)
    said = found(tool, tmp_path / "one", tmp_path / "other", code=1)
    assert said["different"].keys() == {name} and not said["equal"]
    gap = (changed.double() - held[name].double()).abs().max().item()
    largest = max(changed.double().abs().max().item(), held[name].double().abs().max().item())
    assert said["different"][name] == {"elements": 1, "absolute": gap, "relative": gap / largest}
    assert (said["only_in_one"], said["only_in_other"], said["state"]) == ([], [], [])


def test_other_differences(tool: Tool, tmp_path: Path) -> None:
    """The last bit, the sign of zero, a NaN, names, shapes, types, and the state of the run."""
    held = tensors()
    other = {name: tensor.clone() for name, tensor in held.items() if name != "pool/m.A"}
    other["clock/m.C"] = torch.arange(2)
    other["master/m.A"].view(torch.int32)[0, 0] ^= 1
    other["master/norm"][0] = -0.0
    other["exp_avg/norm"][4] = math.nan
    other["exp_avg/m.A"] = held["exp_avg/m.A"].t().contiguous()
    other["exp_avg/m.B"] = held["exp_avg/m.B"].double()
    save(tmp_path / "one", held)
    save(tmp_path / "other", other, step=13, state={**STATE, "attempts": 14})
    said = json.loads(tool(tmp_path / "one", tmp_path / "other", "--json")[1])
    assert (said["only_in_one"], said["only_in_other"]) == (["pool/m.A"], ["clock/m.C"])
    assert said["state"] == ["attempts", "step"]
    different = said["different"]
    assert different.keys() == {"master/m.A", "master/norm", "exp_avg/norm", "exp_avg/m.A", "exp_avg/m.B"}
    assert 0 < different["master/m.A"]["relative"] < 1e-6
    assert different["master/norm"] == {"elements": 1, "absolute": 0.0, "relative": 0.0}
    assert different["exp_avg/norm"]["absolute"] == math.inf
    assert different["exp_avg/m.A"] == {"shapes": [[2, 5], [5, 2]], "dtypes": ["float32"] * 2}
    code, out, _ = tool(tmp_path / "one", tmp_path / "other")
    assert code == 1 and out.endswith(f"{len(held) - 6} of {len(held) - 1} tensors in both are equal bit by bit\n")
    assert "pool/m.A" in out and "attempts differs" in out and "float32 and float64" in out


# ---------------------------------------------------------------- mistakes, and the real program


def test_mistakes(tool: Tool, tmp_path: Path) -> None:
    folder = save(tmp_path / "runs", tensors())
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "none"], "no checkpoint"),
        ([tmp_path / "empty"], "no checkpoint"),
        ([folder / "manifest.json"], "no checkpoint"),
        ([tmp_path / "runs" / "step_00000099"], "no checkpoint"),
        ([folder, tmp_path / "none"], "no checkpoint"),
        ([tmp_path / "empty", "--all"], "--all needs a folder of checkpoints"),
        ([folder, folder, "--all"], "without --all"),
        ([folder, "--all", "--tensors", "*"], "--tensors shows one"),
        ([folder, "--tensors", "nothing*"], "matches no tensor"),
    ):
        code, out, err = tool(*words)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1, words


def test_the_program(tmp_path: Path) -> None:
    folder = save(tmp_path, tensors())
    command = [sys.executable, "tools/inspect_checkpoint.py", str(tmp_path)]
    code, out, err = finish(start(command))
    assert (code, err) == (0, "") and str(folder) in out
