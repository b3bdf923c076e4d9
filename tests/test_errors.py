"""What a program that ends early says, and with which exit code."""

from __future__ import annotations

import os

import pytest

from megalowrank.errors import ConfigError, TrainingError, run_main


def leave(error: Exception | None) -> int:
    """The exit code of a program whose main raises ``error``."""

    def main() -> None:
        if error is not None:
            raise error

    try:
        run_main(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [key for key in os.environ if key == "RANK" or key.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (ConfigError("--x is wrong", 3, "> 4"), 2, "error: --x is wrong; got 3; allowed: > 4\n"),
        (ConfigError("two\nlines"), 2, "error: two lines\n"),
        (TrainingError("too many"), 1, "stopped: too many\n"),
    ],
)
def test_exit_codes(
    error: Exception | None,
    code: int,
    line: str,
    no_launcher: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert leave(error) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_the_first_rank_speaks_at_once_and_others_wait(
    variable: str, no_launcher: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends the others while they wait; an error of one other rank alone is still heard."""
    waited: list[float] = []
    no_launcher.setattr("megalowrank.errors.time.sleep", waited.append)
    no_launcher.setenv(variable, "0")
    assert leave(ConfigError("x")) == 2
    assert capsys.readouterr().err == "error: x\n" and not waited
    no_launcher.setenv(variable, "1")
    assert leave(ConfigError("x")) == 2
    assert capsys.readouterr().err == "rank 1: error: x\n" and len(waited) == 1


def test_our_own_errors_keep_their_traceback(no_launcher: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        leave(ZeroDivisionError())
