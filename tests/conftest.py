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
    parser.addoption("--every-cell", action="store_true", help="all cases of the large tables, not a part of them")
    parser.addoption("--slurm", action="store_true", help="job scripts on a SLURM cluster that the tests bring up")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``every_cell`` or ``slurm`` unless it is asked for."""
    for marker in ("every_cell", "slurm"):
        if not config.getoption(marker):
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(marker)])
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture(scope="session")
def every_cell(pytestconfig: pytest.Config) -> bool:
    """Whether all cases of the large tables are wanted."""
    return bool(pytestconfig.getoption("every_cell"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Token files, manifest and tokenizer of generated text."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
