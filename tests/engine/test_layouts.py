"""One table: every method under every layout, for every family, is the run of one process.

Each cell trains 16 updates (switches and merges among them) divided over ranks, and compares every loss, every
gradient norm, the last evaluation and, put together from what all ranks hold, W, A, B, moments, clocks and
candidates with a dense single process. In float64, which DeepSpeed does not have, tensor and sequence parallelism are
compared to 1e-11; in float32 everything to 2e-5.

``pytest --every-cell`` runs all of it. By default a part runs, in which every layout, method and family occurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megalowrank.methods import METHODS as REGISTRY
from megalowrank.models.architecture import FAMILIES as KNOWN
from tests.engine.layout_cases import FAMILIES, LAYOUTS, METHODS, SHAPES, STEPS, name_of, world_of
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(2400)

TABLE = ("tp2", "tp2 sp", "tp4", "pp2", "pp2 tp2", "pp2 dp2", "tp2 dp2 zero1", "tp2 dp2 zero2", "tp2 dp2 zero3")
EXACT = ("tp2", "tp2 sp", "tp4", "tp4 sp")
RANKS = "granularity='layer'\n[layers.0.q]\nenabled=false\n[layers.1.up]\nrank=2\n[layers.0.o]\nenabled=false\n"
Report = dict[str, Any]


def table() -> Iterator[dict[str, Any]]:
    """Every method under every layout of TABLE for every family; half of the cells with clipping."""
    for m, method in enumerate(METHODS):
        for f, family in enumerate(FAMILIES):
            for number, layout in enumerate(TABLE):
                clip = {"clip": 0.5} if (m + f + number) % 2 else {}
                yield {"method": method, "family": family, "layout": layout, **clip}


def exact() -> Iterator[dict[str, Any]]:
    """Tensor parallelism in float64, both schedules."""
    for m, method in enumerate(METHODS):
        for number, layout in enumerate(EXACT):
            for schedule in ("ride", "partial"):
                family = list(FAMILIES)[(m + number) % len(FAMILIES)]
                case = {"method": method, "family": family, "layout": layout, "schedule": schedule, "float64": True}
                yield {**case, "clip": 0.5} if m % 2 else case


def special() -> Iterator[dict[str, Any]]:
    """Every method under other layouts, for one family each: both schedules, recomputation and offload."""
    layouts = (
        "pp2 offload", "pp2 tp2 sp", "tp2 dp2 zero0", "tp2 sp dp2 zero1", "tp2 sp dp2 zero2", "tp2 sp dp2 zero3",
        "tp2 dp2 zero1 offload", "tp2 dp2 zero2 offload", "tp2 dp2 zero3 offload",
    )  # fmt: skip
    for m, method in enumerate(METHODS):
        for number, layout in enumerate(layouts):
            family = list(FAMILIES)[(m + number) % len(FAMILIES)]
            schedule = ("partial", "ride")[(m + number) // 2 % 2]
            case = {"method": method, "family": family, "layout": layout, "schedule": schedule}
            yield {**case, "recompute": True} if (m + number) % 3 == 0 else case
    for method in ("switchlora", "relora", "golore"):
        yield {"method": method, "family": "llama", "layout": "pp2", "flags": {"lora_target": ["layers.0.*"]}}
    for score, family in (("grad-norm", "neox"), ("synflow", "llama")):
        flags = {"lora_target": ["layers.0.*"], "hetero_score": score}
        yield {"method": "heterolora", "family": family, "layout": "pp2", "flags": flags}
    for layout in ("tp2 sp", "pp2"):
        flags = {"projector": "randomized", "probe_passes": 2}
        yield {"method": "golore", "family": "neox", "layout": layout, "flags": flags}
    for method, layout in (("switchlora", "tp2 sp"), ("golore", "pp2")):
        yield {"method": method, "family": "gpt2", "layout": layout, "flags": {"lora_config": RANKS}}
    for mode, layout in (("separated", "tp2 sp"), ("combined", "pp2"), ("combined", "pp2 tp2 sp")):
        flags = {"hetero_shortcuts": mode, "hetero_score": "synflow"}
        yield {"method": "heterolora", "family": "gpt2", "layout": layout, "flags": flags}
    yield {"method": "switchlora", "family": "opt", "layout": "pp2"}


def low() -> Iterator[dict[str, Any]]:
    """In bfloat16."""
    for number, layout in enumerate(("tp2 sp", "pp2", "pp2 tp2", "tp2 dp2 zero2", "tp2 dp2 zero3")):
        family = list(FAMILIES)[(number + 1) % len(FAMILIES)]
        yield {"method": ("switchlora", "relora")[number % 2], "family": family, "layout": layout, "bf16": True}


def poisoned() -> Iterator[dict[str, Any]]:
    """Two attempts with an infinite gradient on one rank of the first stage: all ranks skip them, and switch once."""
    for layout in ("tp2", "tp2 sp", "pp2", "pp2 tp2", "tp2 dp2 zero2"):
        yield {"method": "switchlora", "family": "llama", "layout": layout, "poison": [3, 11], "clip": 0.5}
    yield {"method": "switchlora", "family": "neox", "layout": "tp2 sp", "poison": [3, 11], "float64": True}


CASES = [*table(), *exact(), *special(), *low(), *poisoned()]


def core(case: dict[str, Any]) -> bool:
    """Whether a case is one of those that always run."""
    if case["family"] not in FAMILIES:
        return True
    m, f = list(METHODS).index(case["method"]), list(FAMILIES).index(case["family"])
    number = list(LAYOUTS).index(case["layout"])
    if case["layout"] in TABLE and not case.keys() & {"float64", "bf16", "poison", "flags"}:
        return (m + number) % 5 == 0 and (m // 2 + number) % len(FAMILIES) == f
    if "float64" in case and "poison" not in case:
        return (m + number + (case["schedule"] == "ride")) % 6 == 0
    return (m + number) % 6 == 0 or case["layout"] in ("pp2", "tp2 sp")


def cells(cases: Iterator[dict[str, Any]]) -> list[Any]:
    """Parameters of a test, the marked ones only for ``--every-cell``."""
    return [pytest.param(case, id=name_of(case), marks=() if core(case) else pytest.mark.every_cell) for case in cases]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """What every rank reports of every case that is going to be tested, by name."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = [item.callspec.params["case"] for item in here if "case" in item.callspec.params]
    found: dict[str, list[Report]] = {}
    for world in (2, 4):
        folder: Path = tmp_path_factory.mktemp(f"layouts_{world}")
        cases = [case for case in chosen if world_of(case["layout"]) == world]
        payload = {"cases": cases, "folder": str(folder)}
        ranks = run_ranks("tests.engine.layout_cases:compare", world, payload, folder, timeout=60 + 40 * len(cases))
        for case, *own in zip(cases, *ranks, strict=True):
            found[name_of(case)] = own
    return found


def test_the_table_has_every_method_and_family() -> None:
    assert METHODS.keys() == REGISTRY.keys(), "a method needs a line in equality_cases.METHODS"
    assert tuple(SHAPES) == KNOWN and set(TABLE) <= LAYOUTS.keys()
    assert len({name_of(case) for case in CASES}) == len(CASES)


def test_what_always_runs_has_everything_once() -> None:
    chosen = [case for case in CASES if core(case)]
    for key, whole in (("method", METHODS), ("family", FAMILIES), ("layout", {case["layout"] for case in CASES})):
        assert {case[key] for case in chosen} >= set(whole)
    for method in METHODS:
        assert len({case["layout"] for case in chosen if case["method"] == method}) >= 2
    assert {case["schedule"] for case in chosen if case.get("float64") and "schedule" in case} == {"ride", "partial"}


@pytest.mark.parametrize("case", cells(chain(table(), special())))
def test_float32(case: dict[str, Any], reports: dict[str, list[Report]]) -> None:
    for report in reports[name_of(case)]:
        check(case, report, 2e-5)


@pytest.mark.parametrize("case", cells(poisoned()))
def test_skipped_updates(case: dict[str, Any], reports: dict[str, list[Report]]) -> None:
    for report in reports[name_of(case)]:
        check(case, report, 1e-11 if case.get("float64") else 2e-5)
        assert report["counters"][0]["attempts"] == STEPS + 2


@pytest.mark.parametrize("case", cells(exact()))
def test_float64(case: dict[str, Any], reports: dict[str, list[Report]]) -> None:
    for report in reports[name_of(case)]:
        check(case, report, 1e-11)


@pytest.mark.parametrize("case", cells(low()))
def test_bfloat16(case: dict[str, Any], reports: dict[str, list[Report]]) -> None:
    """Sums over ranks are rounded to bfloat16 (2^-8 of a term), which an Adam step scales up where terms cancel."""
    for report in reports[name_of(case)]:
        assert report["worst"].get("clock", 0.0) == 0.0
        assert report["worst"]["losses"] < 2e-2 and report["worst"]["mean"] < 3e-3
        assert report["counters"][0].keys() == report["counters"][1].keys()


def of_the_model(counters: dict[str, float]) -> dict[str, float]:
    """The numbers of a method that do not depend on the rank."""
    return {name: value for name, value in counters.items() if not name.endswith(("_ms", "_bytes"))}


def check(case: dict[str, Any], report: Report, tolerance: float) -> None:
    worst, (found, expected) = report["worst"], report["counters"]
    assert {kind: value for kind, value in worst.items() if not value <= tolerance} == {}
    assert worst.get("clock", 0.0) == 0.0
    assert report["learned"] > 0.05 and report["idle"] == [] and report["padding"] == 0
    assert report["starts"][0] == report["starts"][1], "the layout changed initial weights or candidates"
    assert of_the_model(found) == pytest.approx(of_the_model(expected), abs=1e-6)
    if case["method"] in ("golore", "galore"):
        assert found["refreshes"] == 1 and found["projectors_kept"] == 0
    if case["method"] == "switchlora":
        assert found["switched_vectors"] > (100 if "flags" not in case else 40)
    if case["method"] == "relora":
        assert found["merges"] == 3 and found["zeroed_exp_avg"] == pytest.approx(0.7, abs=0.01)
