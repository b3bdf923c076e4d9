"""Saving and resuming a run: tensors by ``checkpoint.shards``, everything else as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megalowrank.checkpoint.heads import head_prefixes
from megalowrank.checkpoint.io import Checkpoint, find_auto
from megalowrank.checkpoint.pieces import Piece
from megalowrank.checkpoint.shards import RunTensors
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.config import ModelConfig, OutputConfig
from megalowrank.engine.engine import Engine
from megalowrank.engine.loop import Position
from megalowrank.errors import ConfigError
from megalowrank.methods.base import Method
from megalowrank.parallel.collectives import all_true, from_first_rank, gather_texts
from megalowrank.parallel.groups import Groups

# what a resumed run must share with the one that was saved: (section of run.json, fields)
MUST_AGREE = (
    ("model", None),
    ("train", ("method", "seed", "seq_length", "global_batch_size", "bf16", "fold_residual")),
    ("method_config", None),
)


@dataclass(frozen=True)
class GroupRanks:
    """The ranks of a job as the checkpoint writer wants them."""

    group: Any
    rank: int
    world: int

    def barrier(self) -> None:
        """Wait for all ranks."""
        all_true(True, self.group)

    def all_ok(self, ok: bool) -> bool:
        """Whether all ranks pass True."""
        return all_true(ok, self.group)


@dataclass(frozen=True)
class RunState:
    """What saving and loading touch. ``run`` is the resolved configuration, written into every checkpoint."""

    engine: Engine
    method: Method
    tensors: RunTensors
    groups: Groups
    run: dict[str, Any]

    def pieces(self, copied: bool = False) -> list[Piece]:
        """The tensors of this rank as they are now; ``copied``: they stay so while training goes on."""
        found = self.tensors.pieces()
        return [replace(piece, tensor=piece.tensor.to("cpu", copy=True)) for piece in found] if copied else found

    def record(self, position: Position) -> dict[str, Any]:
        """Everything else, as JSON. Every rank calls it.

        Schedule, order of samples and every random draw follow from the seed in ``run``, from step and attempts.
        """
        return {
            "attempts": position.attempts,
            **self._of_heads(position),
            "evaluated": position.evaluated,
            "updates": self.engine.state.updates,
            "method_state": united(self.method.state_dict(), self.groups.pipe),
            "run": self.run,
        }

    def _of_heads(self, position: Position) -> dict[str, Any]:
        """What heads may differ in: batches that one of them skipped."""
        if self.groups.heads is None:
            return {}
        return {"attempts_of_heads": list(map(int, gather_texts(str(position.attempts), self.groups.heads.host)))}

    def load(self, output: OutputConfig) -> Position:
        """Resume what ``--load`` names; a fresh start if it is 'auto' and there is nothing yet.

        Every rank calls it. Raises ConfigError for a damaged checkpoint or one of another run.
        """
        if output.load is None:
            return Position()
        path = from_first_rank(lambda: _find(output), self.groups.everyone, self.groups.rank)
        if not path:
            return Position()
        checkpoint = Checkpoint.open(Path(path), verify=False)
        state = checkpoint.state
        self._compare(state["run"], checkpoint.path.name)
        attempts = [int(number) for number in state.get("attempts_of_heads", [state["attempts"]])]
        if self.restarts(checkpoint):
            self.tensors.load_weights(SavedWeights(checkpoint))
            attempts = [max(attempts)] * self.method.replica_groups()
        else:
            self.tensors.load(checkpoint)
            self.tensors.set_updates(int(state["updates"]))
            self.method.load_state_dict(state["method_state"])
        self.engine.reload()
        evaluated = state.get("evaluated", checkpoint.step)
        return Position(checkpoint.step, attempts[self.groups.head], int(evaluated))

    def restarts(self, checkpoint: Checkpoint) -> bool:
        """Whether heads begin anew, from the mean of those of the checkpoint, because there are more or fewer now."""
        saved, now = len(head_prefixes(checkpoint.names())), self.method.replica_groups()
        if saved != now and self.groups.rank == 0:
            what = "their mean is merged into the weights, and factors and optimizer state begin anew"
            print(f"{checkpoint.path.name} has {saved} head(s), this run has {now}: {what}", flush=True)
        return saved != now

    def _compare(self, saved: dict[str, Any], name: str) -> None:
        free = {f.name for kind in (ModelConfig, self.method.config) for f in fields(kind) if f.metadata.get("free")}
        for section, names in MUST_AGREE:
            for key in names or self.run[section].keys() - free:
                # an older version had no such choice; what it would change is seen in the tensors
                if key in saved[section] and saved[section][key] != self.run[section].get(key):
                    raise ConfigError(
                        f"--{key.replace('_', '-')} differs from the checkpoint {name}",
                        self.run[section].get(key),
                        saved[section].get(key),
                    )
        classes, before = (list(run.get("labels") or ()) for run in (self.run, saved))
        if classes != before:
            got, allowed = (", ".join(names)[:100] or "none" for names in (classes, before))
            raise ConfigError(f"--labelled-data has other classes than the checkpoint {name}", got, allowed)


def united(state: dict[str, Any], group: Any) -> dict[str, Any]:
    """``state`` with the keys that other pipeline stages have in its mappings; every rank of ``group`` calls it."""
    found: dict[str, Any] = {}
    for text in gather_texts(json.dumps(state), group):
        for key, value in json.loads(text).items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def starting_point(output: OutputConfig, groups: Groups) -> tuple[OutputConfig, SavedWeights | None]:
    """What to resume, and the weights to start from instead of drawn ones.

    With ``--finetune`` the checkpoint that ``--save`` already has, else the weights of ``--load``: the same command
    starts a run and, after an interruption, goes on with it. Every rank calls it. Raises ConfigError for a damaged
    checkpoint, and for a new run in a folder that has checkpoints of another.
    """
    if output.load is not None and not output.finetune:
        return output, None
    begun = from_first_rank(lambda: "yes" * _has_checkpoint(output), groups.everyone, groups.rank)
    if begun and not output.finetune:
        raise ConfigError("--save has checkpoints of an earlier run", output.save, "--load auto, or another folder")
    if begun or not output.finetune:
        return replace(output, load="auto" if begun else None), None
    path = from_first_rank(lambda: str(Checkpoint.open(Path(output.load or ".")).path), groups.everyone, groups.rank)
    return replace(output, load=None), SavedWeights(Checkpoint.open(Path(path), verify=False))


def _has_checkpoint(output: OutputConfig) -> bool:
    return output.save is not None and find_auto(Path(output.save)) != (None, ())


def _find(output: OutputConfig) -> str:
    """The checkpoint to resume, verified; empty for a fresh start."""
    if output.load != "auto":
        return str(Checkpoint.open(Path(output.load or ".")).path)
    found, refused = find_auto(Path(output.save or "."))
    for reason in refused:
        print(f"not resumed: {reason}", flush=True)
    if found is None and refused:
        raise ConfigError("--load auto finds no intact checkpoint", f"{len(refused)} damaged ones in {output.save}")
    return "" if found is None else str(found)
