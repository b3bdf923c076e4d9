"""A checkpoint of any layout goes on under any other: loaded is what was saved, and the run is that of one process.

6 updates under one layout, then 10 under another, on the same or another number of ranks, compared with one dense
process that made all 16 (switches, merges and frozen vectors among them). ``pytest --every-cell`` runs every pair with
every method; by default a part runs in which each method, and each kind of parallelism on either side, occurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoint.topology_cases import CUT, name_of
from tests.engine.layout_cases import FAMILIES, METHODS, world_of
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(2400)

PAIRS = (
    ("dp2 zero3", "pp2 tp2 sp"), ("pp2", "tp2 dp2 zero3"), ("tp2 sp", "pp2 dp2"), ("dp2", "tp4"),
    ("tp2 dp2 zero3", "pp2"), ("pp2 tp2 sp", "dp2 zero2"), ("pp2 dp2", "dp2 zero3"), ("tp4", "tp2"),
    ("tp2 dp2 zero1", "dp2 zero1"), ("tp2 dp2 zero2", "pp2 tp2"), ("pp2 tp2", "tp2 sp dp2 zero3"),
    ("tp4 sp", "pp2 dp2"),
)  # fmt: skip


def cases() -> Iterator[dict[str, Any]]:
    """Every pair with every method, the families in turn; two pairs in bfloat16."""
    for m, method in enumerate(METHODS):
        for number, (layout, then) in enumerate(PAIRS):
            family = list(FAMILIES)[(m + number) % len(FAMILIES)]
            yield {"method": method, "family": family, "layout": layout, "then": then}
    for method, pair in (("switchlora", ("tp2 dp2 zero2", "pp2 tp2")), ("relora", ("dp2 zero3", "pp2 tp2 sp"))):
        yield {"method": method, "family": "llama", "layout": pair[0], "then": pair[1], "bf16": True}
    shortcuts = {"hetero_shortcuts": "combined", "hetero_score": "snip"}
    yield {"method": "heterolora", "family": "gpt2", "layout": "pp2", "then": "tp2 dp2 zero3", "flags": shortcuts}


CASES = [{**case, "folder": f"case_{number}"} for number, case in enumerate(cases())]


def core(case: dict[str, Any]) -> bool:
    """Whether a case always runs."""
    m, pair = list(METHODS).index(case["method"]), PAIRS.index((case["layout"], case["then"]))
    if "flags" in case:
        return True
    return case["method"] == "switchlora" if "bf16" in case else pair % 2 == 0 and (pair // 2 + m) % 6 == 0


def cells(chosen: list[dict[str, Any]]) -> list[Any]:
    """Parameters of a test, the marked ones only for ``--every-cell``."""
    return [pytest.param(case, id=name_of(case), marks=() if core(case) else pytest.mark.every_cell) for case in chosen]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What every rank reports of every case that is going to be tested, by name.

    Two ranks begin, four finish that and begin more, two finish those.
    """
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = [item.callspec.params["case"] for item in here]
    root = tmp_path_factory.mktemp("topologies")

    def worlds(first: int, second: int | None = None) -> list[dict[str, Any]]:
        begun = [case for case in chosen if world_of(case["layout"]) == first]
        return begun if second is None else [case for case in begun if world_of(case["then"]) == second]

    found: dict[str, list[Any]] = {}
    for world, begin, finish in (
        (2, worlds(2), []),
        (4, worlds(4), worlds(2, 4) + worlds(4, 4)),
        (2, [], worlds(4, 2)),
    ):
        payload = {"begin": begin, "finish": finish, "folder": str(root)}
        if begin or finish:
            timeout = 60 + 40 * (len(begin) + len(finish))
            ranks = run_ranks("tests.checkpoint.topology_cases:go", world, payload, root, timeout=timeout)
            found.update({name: [rank[name] for rank in ranks] for name in ranks[0]})
    return found


@pytest.mark.parametrize("case", cells(CASES))
def test_what_was_begun_goes_on(case: dict[str, Any], reports: dict[str, list[Any]]) -> None:
    for report in reports[name_of(case)]:
        assert report["position"] == [CUT, CUT]
        assert report["digests"][0] == report["digests"][1], "what was loaded is not what was saved"
        assert report["worst"].get("clock", 0.0) == 0.0 and report["padding"] == 0 and report["learned"] > 0.03
        if "bf16" in case:
            assert report["worst"]["losses"] < 2e-2 and report["worst"]["mean"] < 3e-3
        else:
            assert {kind: value for kind, value in report["worst"].items() if not value <= 2e-5} == {}


def test_what_always_runs_has_everything_once() -> None:
    chosen = [case for case in CASES if core(case)]
    assert {case["method"] for case in chosen} == METHODS.keys()
    assert len({(case["layout"], case["then"]) for case in chosen}) >= len(PAIRS) // 2
    for sizes in ("tp", "pp", "dp", "zero3", "sp"):
        for side in ("layout", "then"):
            assert any(sizes in case[side] for case in chosen)
