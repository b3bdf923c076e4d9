"""The weights of a checkpoint as a plain model has them: folded, merged, float32, whatever method trained them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megalowrank.checkpoint.heads import head_prefixes, without_head
from megalowrank.checkpoint.io import Checkpoint
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.lowrank.fold import join_residual
from megalowrank.methods import method_class
from megalowrank.parallel.collectives import gather_texts

HEAD, SCORE = "output.weight", "score.weight"  # of the vocabulary, and of a labelled task
_FACTORS = (".A", ".B")


class SavedWeights:
    """Weights by logical name, read as they are asked for. Every rank may read alone; nothing is communicated.

    Shortcuts that are on are no weights of a plain model: ConfigError, unless ``without_shortcuts`` leaves them out.
    """

    def __init__(self, checkpoint: Checkpoint, without_shortcuts: bool = False) -> None:
        self.checkpoint, self.run = checkpoint, checkpoint.state["run"]
        self._stored = set(checkpoint.names())
        self._heads = head_prefixes(self._stored)
        self.names = {
            name.split("/", 1)[1]
            for name in map(without_head, self._stored)
            if name.startswith(("master/", "weight/")) and not name.endswith(_FACTORS)
        }
        kind = method_class(self.run["method"])
        method = kind(kind.config_class(**self.run["method_config"]))
        self.adapters = method.adapters()
        self._left_out = method.left_out(checkpoint.state.get("method_state", {}))
        if not without_shortcuts:
            self._refuse_shortcuts()

    @classmethod
    def open(cls, path: Path, without_shortcuts: bool = False) -> SavedWeights:
        """A checkpoint, or the newest one of a folder, with its hashes verified; ConfigError if it is damaged."""
        return cls(Checkpoint.open(path), without_shortcuts)

    def _refuse_shortcuts(self) -> None:
        stored = {name.split("/", 1)[1].rsplit(".", 1)[0] for name in self._stored if ".shortcut." in name}
        on = sorted(stored - self._left_out)
        if on:
            raise ConfigError(
                f"the checkpoint {self.checkpoint.path.name} has shortcuts that a plain model cannot express",
                f"{len(on)} on, such as {on[0]}",
                "tools/convert_hf.py or tools/merge.py with --without-shortcuts, which gives another function",
            )

    def model_config(self) -> ModelConfig:
        """The shape of the model that was trained. ConfigError if this version does not know a field of it."""
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        saved: dict[str, Any] = self.run["model"]
        if saved.keys() - known:
            raise ConfigError(
                f"the checkpoint {self.checkpoint.path.name} was written by another version",
                f"unknown {sorted(saved.keys() - known)[0]}",
            )
        return ModelConfig(**saved)

    def leave_heads(self, labels: tuple[str, ...] | None) -> bool:
        """Take no notice of the head, unless it is that of a task with these ``labels``.

        Returns whether the task needs a new one.
        """
        known = self.run.get("labels")
        same = SCORE in self.names and labels == (None if known is None else tuple(known))
        self.names -= {HEAD} if same else {HEAD, SCORE}
        return not same

    def initial(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """As ``read``, for a model that starts from it; None for the head of a task that it has not."""
        return None if name == SCORE and name not in self.names else self.read(name, shape)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight called ``name`` with s·B·A merged into it: float32 (or float64) of ``shape``.

        Raises ConfigError if there is none, or of another shape.
        """
        return self.merged(name, self.read_frozen(name, shape))

    def merged(self, name: str, frozen: torch.Tensor) -> torch.Tensor:
        """``frozen``, the weight called ``name`` without its factors, with s·B·A added."""
        matrix = name.removesuffix(".weight")
        factors = self.factors(matrix)
        return frozen if factors is None else frozen.addmm(factors[1].t(), factors[0], alpha=self.scale(matrix))

    def scale(self, matrix: str) -> float:
        """s of s·B·A of an adapted matrix; 0 where it has no factors."""
        spec = None if self.adapters is None else self.adapters.spec_of(matrix)
        return 0.0 if spec is None else spec.scale

    def factors(self, matrix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A [k, in] and Bᵀ [k, out] of an adapted matrix (its name ends before ``.weight``), in the type of masters.

        k is the rank r; with snapshots 2 r for each head, so that B A is the mean of what heads have learned. None
        where the method computes without them.
        """
        if matrix in self._left_out:
            return None
        pairs = [self._pair(head, matrix) for head in self._heads]
        found = [pair for pair in pairs if pair is not None]
        count = len(found) * (1 if self.adapters is None else self.adapters.spec.chunks)
        if count < 2:
            return pairs[0]
        return torch.cat([A for A, _ in found]), torch.cat([Bt for _, Bt in found]) / count

    def _pair(self, head: str, matrix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of one head, with its snapshots, if it has any, negated in Bᵀ."""
        names = [self._place_of(head, f"{matrix}{side}") for side in _FACTORS]
        if not all(name in self._stored for name in names):
            return None
        A, Bt = (self.checkpoint.read(name).view(self.checkpoint.shape(name)) for name in names)
        dtype = torch.promote_types(A.dtype, Bt.dtype)
        A, Bt = A.to(dtype), Bt.to(dtype)
        names = [f"{head}fixed/{matrix}{side}_snapshot" for side in _FACTORS]
        if names[0] not in self._stored:
            return A, Bt
        old_A, old_Bt = (self.checkpoint.read(name).view(self.checkpoint.shape(name)).to(dtype) for name in names)
        return torch.cat((A, old_A)), torch.cat((Bt, -old_Bt))

    def _place_of(self, head: str, factor: str) -> str:
        """Where a factor is stored: as a master, or, without gradient, as it is."""
        return f"{head}fixed/{factor}" if f"{head}fixed/{factor}" in self._stored else f"{head}master/{factor}"

    def read_frozen(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As ``read``, without s·B·A."""
        if name not in self.names:
            raise ConfigError(f"the checkpoint {self.checkpoint.path.name} lacks {name}", None, "a model of this shape")
        places = [f"{head}master/{name}" for head in self._heads if f"{head}master/{name}" in self._stored]
        stored = places or [f"weight/{name}"]
        found = tuple(self.checkpoint.shape(stored[0]))
        if found != tuple(shape):
            raise ConfigError(f"{name} in the checkpoint {self.checkpoint.path.name} has another shape", found, shape)
        values = [self.checkpoint.read(place) for place in stored]
        value = (values[0] if len(values) == 1 else torch.stack(values).mean(0)).view(shape)
        if f"residual/{name}" in self._stored:
            value = join_residual(value, self.checkpoint.read(f"residual/{name}").view(shape))
        return value if value.dtype == torch.float64 else value.float()

    def check_covered(self, wanted: set[str], stages: Any = None) -> None:
        """Raise ConfigError if the checkpoint has weights that nobody wants: it is of another model.

        ``wanted`` by this rank, or by any rank of the group ``stages``, all of which then call it.
        """
        everywhere = {name for text in gather_texts("\n".join(wanted), stages) for name in text.split("\n")}
        surplus = sorted(self.names - everywhere)
        if surplus:
            raise ConfigError(
                f"the checkpoint {self.checkpoint.path.name} has a weight that the model lacks: {surplus[0]}",
                f"{len(surplus)} of them", "a checkpoint of a model of this shape",
            )  # fmt: skip
