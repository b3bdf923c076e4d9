"""Options of the suite, and the fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import TinyCorpus, make_corpus


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir``: where the traces of reference implementations lie; ``--tp``, ``--pp``: how to divide them."""
    default = Path(__file__).parent / "golden" / "data"
    parser.addoption("--golden-dir", default=str(default), help="folder of golden traces; default: the project's copy")
    parser.addoption("--tp", type=int, choices=(1, 2, 4), help="tensor-parallel size of golden replays")
    parser.addoption("--pp", type=int, choices=(1, 2), help="pipeline-parallel size of golden replays")
    parser.addoption("--every-cell", action="store_true", help="the whole table of layouts, not a quarter of it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``every_cell`` unless it is asked for."""
    if config.getoption("--every-cell"):
        return
    rest = [item for item in items if item.get_closest_marker("every_cell")]
    config.hook.pytest_deselected(items=rest)
    items[:] = [item for item in items if not item.get_closest_marker("every_cell")]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Token files, manifest and tokenizer of generated text."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
