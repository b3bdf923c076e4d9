"""Options of the suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir``: where the traces of reference implementations lie."""
    default = Path(__file__).parent / "golden" / "data"
    parser.addoption("--golden-dir", default=str(default), help="folder of golden traces; default: the project's copy")
