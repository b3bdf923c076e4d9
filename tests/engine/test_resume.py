"""A run that is cut, saved, loaded into a fresh process and continued equals the run without a break, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalowrank.checkpoint.io import Checkpoint
from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.write import SoloRanks, save_checkpoint
from megalowrank.config import OutputConfig
from megalowrank.engine.loop import Position
from megalowrank.errors import ConfigError
from megalowrank.parallel.groups import Groups, initialize_single_process
from tests.engine.equality_cases import STEPS
from tests.engine.resume_cases import VARIANTS, Process, dense_process, run_json, save_now
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(900)

CPU = {"device": "cpu"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2 offload": {"stage": 2, "zero": {"offload_optimizer": CPU}},
    "zero3": {"stage": 3},
    "zero3 all offload": {"stage": 3, "zero": {
        "offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0, "sub_group_size": 40,
    }},
}  # fmt: skip
CUTS = ((2, 3), (3, 3), (1, 4))


def case(root: Path, name: str, variant: str, layout: str, **more: Any) -> dict[str, Any]:
    folder = str(root / f"{name}_{variant}_{layout}_{len(more)}_{more.get('bf16')}".replace(" ", "_"))
    return {"variant": variant, "layout": layout, **VARIANTS[variant], **LAYOUTS[layout], "folder": folder, **more}


def resume_cases(root: Path, name: str) -> list[dict[str, Any]]:
    """FIFO, switching often or seldom, under every layout, others under every third; cuts and precision in turns."""
    found = []
    for v, variant in enumerate(VARIANTS):
        for at, layout in enumerate(LAYOUTS):
            everywhere = variant in ("fifo", "sparse")
            if everywhere or (v + at) % 3 == 0:
                bf16 = (v + at if everywhere else (v + at) // 3) % 2 == 1
                found.append(case(root, name, variant, layout, bf16=bf16, cuts=CUTS[(v + at) % len(CUTS)]))
    moves = (("zero0", [3, 1], False), ("zero3", [0, 2], True), ("zero1", [2, 3], True))
    found += [
        case(root, name + "_moved", "fifo", layout, bf16=bf16, cuts=[2, 4], stages=stages)
        for layout, stages, bf16 in moves
    ]  # fmt: skip
    return found


def saved_cases(root: Path) -> list[dict[str, Any]]:
    return [
        case(root, "saved", variant, layout, bf16=bf16)
        for variant, bf16 in (("fifo", False), ("fifo", True), ("full", False)) for layout in LAYOUTS
    ]  # fmt: skip


def reloaded_cases(root: Path) -> list[dict[str, Any]]:
    """The folders of ``saved_cases``, loaded on another number of ranks under another layout and saved again."""
    others = {name: list(LAYOUTS.values())[(at + 2) % len(LAYOUTS)] for at, name in enumerate(LAYOUTS)}
    return [
        {**c, "zero": {}, **others[c["layout"]], "load": c["folder"], "folder": c["folder"] + "_again"}
        for c in saved_cases(root)
    ]


Reports = dict[int, list[tuple[dict[str, Any], list[dict[str, Any]]]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Every case with the reports of its ranks, by number of ranks."""
    root, found = tmp_path_factory.mktemp("resume"), {}
    for world in (1, 2):
        cases = resume_cases(root, f"on_{world}")
        chosen = [*cases, one_sided(root)] if world == 2 else [*cases[::3], *cases[-2:]]
        ranks = run_ranks("tests.engine.resume_cases:resume", world, chosen, root, timeout=600)
        found[world] = [(c, list(r)) for c, r in zip(chosen, zip(*ranks, strict=True), strict=True)]
    return found


def one_sided(root: Path) -> dict[str, Any]:
    """A checkpoint of another rank, of factors that only the first of two ranks holds."""
    flags = {"lora_rank": 5, "lora_target": ["layers.0.attention.o"]}
    other = {"lora_rank": 4}
    return {"method": "lora", "stage": 1, "flags": flags, "other": other, "folder": str(root / "one_sided")}


@pytest.mark.parametrize("world", [1, 2])
def test_bitwise_equal_to_the_run_without_a_break(reports: Reports, world: int) -> None:
    assert len(reports[world]) > (20 if world == 2 else 8)
    for case, ranks in reports[world]:
        for report in ranks if "other" not in case else ():
            assert {kind: d for kind, d in report["worst"].items() if d["max"] != 0.0} == {}, case
            assert {"loss", "master", "exp_avg", "exp_avg_sq", "forward", "births"} <= report["worst"].keys()
            assert ({"weight"} <= report["worst"].keys()) == (case["method"] != "full")
            assert ({"pool"} <= report["worst"].keys()) == (case["method"] == "switchlora")


def test_cuts_fall_into_freeze_windows_and_between_switches(reports: Reports) -> None:
    """Some cuts have switches right before and after them; others frozen rows, but no switch right before or after."""
    between, quiet = 0, 0
    for case, ranks in reports[2][:-1]:
        report = ranks[0]
        for cut, rows in zip(case["cuts"], report["frozen"], strict=True):
            before, after = report["switches"][cut - 1 : cut + 1]
            between += before > 0 and after > 0
            quiet += rows > 0 and 0 in (before, after)
        assert (sum(report["switches"]) > 0) == (case["method"] == "switchlora")
    assert between > 20 and quiet > 2


# ---------------------------------------------------------------- what is in the files


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], str]]:
    """Cases saved by two ranks, and the folder into which one rank saved them again."""
    root = tmp_path_factory.mktemp("files")
    run_ranks("tests.engine.resume_cases:save_and_reload", 2, saved_cases(root), root, timeout=600)
    ranks = run_ranks("tests.engine.resume_cases:save_and_reload", 1, reloaded_cases(root), root, timeout=600)
    return list(zip(saved_cases(root), ranks[0], strict=True))


def contents(folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of the latest checkpoint, with its logical shape."""
    checkpoint = Checkpoint.open(Path(folder))
    return {name: checkpoint.read(name).view(checkpoint.shape(name)) for name in checkpoint.names()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_files_do_not_depend_on_the_layout(folders: list[tuple[dict[str, Any], str]]) -> None:
    """After the same training under any stage: the same names, shapes, types and values."""
    reference: dict[str, dict[str, torch.Tensor]] = {}
    for case, _ in folders:
        found = contents(case["folder"])
        kind = f"{case['variant']} {case['bf16']}"
        assert same(reference.setdefault(kind, found), found), case
    assert len(reference) == 3 and len(folders) == 15
    assert not same(reference["fifo False"], reference["fifo True"])


def test_names_are_those_of_the_whole_model(folders: list[tuple[dict[str, Any], str]]) -> None:
    found = {c["variant"] + str(c["bf16"]): contents(c["folder"]) for c, _ in folders}
    names = found["fifoTrue"].keys()
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "weight", "residual", "clock", "pool"}
    assert "residual/layers.0.attention.k.weight" not in found["fifoFalse"]
    shapes = {name: tuple(tensor.shape) for name, tensor in found["fifoTrue"].items()}
    assert shapes["master/layers.1.attention.k.A"] == (5, 12)
    assert shapes["exp_avg/layers.1.attention.k.B"] == (5, 6)
    assert shapes["weight/layers.0.mlp.gate.weight"] == shapes["residual/layers.0.mlp.up.weight"] == (17, 12)
    assert shapes["clock/layers.0.mlp.down.A"] == (5,) and shapes["pool/layers.0.mlp.down.A"] == (7, 17)
    assert tuple(found["fullFalse"]["master/layers.0.attention.v.weight"].shape) == (6, 12)
    assert {name.split("/")[0] for name in found["fullFalse"]} == {"master", "exp_avg", "exp_avg_sq"}


def test_another_number_of_ranks_and_another_stage_reads_the_same(folders: list[tuple[dict[str, Any], str]]) -> None:
    for case, again in folders:
        assert again != case["folder"]
        assert same(contents(case["folder"]), contents(again)), case


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    yield initialize_single_process(str(tmp_path_factory.mktemp("store") / "store"))


def save(process: Process, folder: Path, step: int) -> None:
    save_now(process.state, folder, Position(step, step))


def refusal(process: Process, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        process.state.load(OutputConfig(save=str(folder), load=str(folder)))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def rewritten(process: Process, folder: Path, change: Any) -> None:
    """Save a checkpoint whose pieces went through ``change``."""
    state = {
        "attempts": 2,
        "evaluated": 0,
        "updates": 2,
        "method_state": process.method.state_dict(),
        "run": run_json(VARIANTS["fifo"], process.method),
    }
    save_checkpoint(folder, 2, change(process.state.tensors.pieces()), state, SoloRanks())


def test_a_sound_checkpoint_is_not_refused(groups: Groups, tmp_path: Path) -> None:
    process = dense_process(groups)
    process.advance(0, 2)
    rewritten(process, tmp_path, lambda pieces: pieces)
    fresh = dense_process(groups)
    assert fresh.state.load(OutputConfig(load=str(tmp_path))) == Position(2, 2)
    fresh.advance(2, STEPS)
    process.advance(2, STEPS)
    assert fresh.losses == process.losses[2:]


@pytest.mark.parametrize(
    "name",
    ["master/layers.0.mlp.up.A", "exp_avg_sq/norm.weight", "weight/layers.1.attention.q.weight",
     "clock/layers.1.mlp.down.B", "pool/layers.0.attention.o.B"],
)  # fmt: skip
def test_missing_surplus_and_misshapen_tensors_are_named(groups: Groups, tmp_path: Path, name: str) -> None:
    process = dense_process(groups)
    changes = {
        "lacks": lambda pieces: [piece for piece in pieces if piece.name != name],
        "surplus": lambda pieces: [*pieces, Piece.whole(name + "2", torch.zeros(2))],
        "shape": lambda pieces: [reshaped(piece) if piece.name == name else piece for piece in pieces],
        "precision": lambda pieces: [retyped(piece) if piece.name == name else piece for piece in pieces],
    }
    for word, change in changes.items():
        rewritten(process, tmp_path / word, change)
        message = refusal(process, tmp_path / word)
        assert word in message and name in message, message


def reshaped(piece: Piece) -> Piece:
    return Piece.whole(piece.name, torch.cat((piece.tensor, piece.tensor[:1])))


def retyped(piece: Piece) -> Piece:
    other = torch.int32 if piece.tensor.dtype == torch.int64 else torch.float64
    return Piece(piece.name, piece.shape, piece.box, piece.flat, piece.tensor.to(other))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("train", "method", "lora"), ("train", "seed", 4), ("train", "seq_length", 8), ("train", "global_batch_size", 8),
     ("train", "bf16", True), ("train", "fold_residual", "int8"), ("model", "hidden_size", 24),
     ("model", "num_query_groups", 2), ("method_config", "lora_alpha", 2.0),
     ("method_config", "switch_interval", 9)],
)  # fmt: skip
def test_a_run_of_another_kind_is_named(groups: Groups, tmp_path: Path, section: str, key: str, value: Any) -> None:
    process = dense_process(groups)
    save(process, tmp_path, 2)
    process.state.run[section][key] = value
    message = refusal(process, tmp_path)
    assert f"--{key.replace('_', '-')}" in message and str(value) in message and "step_00000002" in message


def test_every_rank_refuses_what_one_of_them_cannot_load(reports: Reports) -> None:
    """Otherwise the others would wait for it."""
    case, ranks = reports[2][-1]
    assert "other" in case and len(ranks) == 2
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "--lora-rank differs" in ranks[0]["error"]


def test_another_freeze_or_rank_is_refused(groups: Groups, tmp_path: Path) -> None:
    save(dense_process(groups), tmp_path, 2)
    assert "--switch-freeze-steps" in refusal(dense_process(groups, switch_freeze_steps=1), tmp_path)
    assert "--lora-rank" in refusal(dense_process(groups, lora_rank=4), tmp_path)


def test_what_does_not_change_the_run_may_change(groups: Groups, tmp_path: Path) -> None:
    save(dense_process(groups), tmp_path, 2)
    moved = dense_process(groups, offload_candidates=False)
    assert moved.state.load(OutputConfig(load=str(tmp_path))) == Position(2, 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_names_the_checkpoint_before(groups: Groups, tmp_path: Path) -> None:
    process = dense_process(groups)
    for step in (1, 2):
        process.advance(step - 1, step)
        save(process, tmp_path, step)
    flip_a_bit(tmp_path / "step_00000002" / "rank_00000.safetensors")
    message = refusal(dense_process(groups), tmp_path)
    assert "damaged" in message and "the one before is step_00000001" in message


def test_load_auto_falls_back_to_the_one_before(groups: Groups, tmp_path: Path, capsys: Any) -> None:
    auto = OutputConfig(save=str(tmp_path), load="auto")
    process = dense_process(groups)
    assert process.state.load(auto) == Position()
    for step in (1, 2, 3):
        process.advance(step - 1, step)
        save(process, tmp_path, step)
    flip_a_bit(tmp_path / "step_00000003" / "rank_00000.safetensors")
    manifest = tmp_path / "step_00000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 1}))
    fresh = dense_process(groups)
    assert fresh.state.load(auto) == Position(1, 1)
    printed = capsys.readouterr().out
    assert printed.count("not resumed") == 2 and "step_00000003" in printed and "step_00000002" in printed
    fresh.advance(1, 3)
    assert fresh.losses == process.losses[1:]
    flip_a_bit(tmp_path / "step_00000001" / "rank_00000.safetensors")
    with pytest.raises(ConfigError, match="no intact checkpoint"):
        fresh.state.load(auto)
