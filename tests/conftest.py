"""Options of the suite, and the fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import TinyCorpus, make_corpus


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir``: where the traces of reference implementations lie."""
    default = Path(__file__).parent / "golden" / "data"
    parser.addoption("--golden-dir", default=str(default), help="folder of golden traces; default: the project's copy")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Token files, manifest and tokenizer of generated text."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
