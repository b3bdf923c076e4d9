"""Scores against transformers and autograd in one process, with real masks and gradients taken of them.

The reference knows nothing of probes: every weight is W + s·m·B A with leaves A, B and (for SNIP) masks, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from megalowrank.methods.allocation import allocate
from megalowrank.parallel.groups import initialize_single_process
from tests.engine.layout_cases import batch, build
from tests.harness import run_ranks
from tests.methods.importance_cases import BATCHES, KEY
from tests.models.hugging_face import hugging_face, logical, theirs
from tests.models.logit_cases import with_factors

FLAGS = {"lora_init": "switchlora", "lora_alpha": 4.0}
LAYOUTS = {
    "llama": ("tp2", "tp2 sp", "pp2", "dp2 zero1", "dp2 zero2"),
    "opt": ("tp2", "tp2 sp", "pp2", "dp2 zero2", "dp2 zero3"),
}
CASES = [
    {"method": "heterolora", "family": family, "layout": layout, "flags": FLAGS, "float64": layout.startswith("tp2")}
    for family, layouts in LAYOUTS.items() for layout in layouts
]  # fmt: skip
LOW = 5e-3  # of OPT's SynFlow in float32: the norms of states that are nearly alike cancel
Tensors = dict[str, torch.Tensor]
Loss = Callable[..., torch.Tensor]


class Reference:
    """Scores of a family by name, and what loss they come from."""

    def __init__(self, family: str) -> None:
        _, model, self.config = build({"method": "heterolora", "family": family, "flags": FLAGS}, None, {})
        self.weights, self.names = logical(model), [layer.name for layer in model.layers]
        self.scales = {layer.name: layer.scale for layer in model.layers}
        self.theirs = hugging_face(self.config, model, torch.float64)

    def loss(self, weights: Tensors, step: int, ones: bool = False, scales: dict[str, float] | None = None) -> Any:
        """The mean over the micro-batches of a step."""
        found = theirs(self.config, with_factors(weights, scales or self.scales))
        losses = []
        for tokens in batch(step):
            given: dict[str, Any] = {"input_ids": tokens[:, :-1]}
            if ones:
                shape = (*tokens[:, :-1].shape, self.config.hidden_size)
                given = {"inputs_embeds": torch.ones(shape, dtype=torch.float64)}
            logits = functional_call(self.theirs, found, (), {**given, "use_cache": False}).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        return torch.stack(losses).mean()

    def gradients(self, weights: Tensors, leaves: Tensors, ones: bool = False) -> Tensors:
        """Summed over steps."""
        total = torch.stack([self.loss(weights, step, ones) for step in range(BATCHES)]).sum()
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    def scores(self) -> dict[str, list[float]]:
        sides = [f"{name}.{side}" for name in self.names for side in "AB"]
        leaves = {name: self.weights[name].clone().requires_grad_() for name in sides}
        plain = self.gradients({**self.weights, **leaves}, leaves)
        norms = {name: float(gradient.norm()) for name, gradient in plain.items()}
        return {
            "constant": [1.0] * len(self.names),
            "grad-norm": [norms[f"{name}.A"] + norms[f"{name}.B"] for name in self.names],
            "snip": self._masked(self.weights, sides, False),
            "synflow": self._masked({name: value.abs() for name, value in self.weights.items()}, sides, True),
            "alpha-test": self._alpha(),
        }

    def _masked(self, weights: Tensors, sides: list[str], ones: bool) -> list[float]:
        masks = {name: torch.ones_like(weights[name]).requires_grad_() for name in sides}
        masked = {**weights, **{name: mask * weights[name] for name, mask in masks.items()}}
        found = {name: float(g.abs().sum()) for name, g in self.gradients(masked, masks, ones).items()}
        return [found[f"{name}.A"] + found[f"{name}.B"] for name in self.names]

    def _alpha(self) -> list[float]:
        """The first tenth that keeps perplexity, from below."""

        def perplexity(scales: dict[str, float]) -> float:
            with torch.no_grad():
                losses = [float(self.loss(self.weights, step, scales=scales)) for step in range(BATCHES)]
            return math.exp(sum(losses) / len(losses))

        limit, found = 1.01 * perplexity(self.scales), []
        for name in self.names:
            tenths = (a for a in range(10) if perplexity({**self.scales, name: self.scales[name] * a / 10}) <= limit)
            found.append(float(next(tenths, 10)))
        return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    initialize_single_process(str(tmp_path_factory.mktemp("single") / "store"))
    return {family: Reference(family).scores() for family in ("llama", "opt")}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By case, what every rank found."""
    folder: Path = tmp_path_factory.mktemp("importance")
    return list(zip(*run_ranks("tests.methods.importance_cases:go", 2, CASES, folder, timeout=600), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n]['family']}, {CASES[n]['layout']}")
def test_scores_and_choices_are_those_of_one_process(number: int, references: Any, reports: Any) -> None:
    case = CASES[number]
    expected = references[case["family"]]
    for report in reports[number]:
        for name, values in expected.items():
            found = list(report["scores"][name].values())
            rough = LOW if (case["family"], name) == ("opt", "synflow") else 2e-5
            exact = case["float64"]
            assert found == pytest.approx(values, rel=1e-7 if exact else rough, abs=1e-6 * max(values)), name
            choice = allocate(values, [False] * len(values), 0.25, "off", KEY)
            assert report["on"][name] == list(choice.on), name
        assert all(len(set(values)) > 2 for name, values in expected.items() if name != "constant")
        assert report["same"] and report["random"] and report["gradients"] == 0
        assert report["bits"] == [True, True]
