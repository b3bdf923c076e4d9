"""metrics.jsonl through kills, resumes and garbage; progress on terminals and in files."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megalowrank.engine import metrics
from megalowrank.engine.metrics import MetricsWriter, Progress, read_metrics
from megalowrank.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def filled(path: Path, steps: range) -> MetricsWriter:
    writer = MetricsWriter(path, True)
    for step in steps:
        writer.write({"step": step, "loss": float(step)})
    return writer


def test_every_line_is_there_at_once_and_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = MetricsWriter(path, True)
    record = {
        "step": 3, "loss": float("nan"), "lr": 1e-3, "grad_norm": math.inf, "tokens": 10**12, "skipped": True,
        "memory_bytes": np.int64(7), "tokens_per_second": torch.tensor(2.5), "method_time_ms": np.float32("-inf"),
    }  # fmt: skip
    writer.write(record)
    expected = {
        "step": 3, "loss": None, "lr": 1e-3, "grad_norm": None, "tokens": 10**12, "skipped": True,
        "memory_bytes": 7, "tokens_per_second": 2.5, "method_time_ms": None,
    }  # fmt: skip
    text = path.read_text()
    assert text.endswith("\n") and not re.search("NaN|Infinity", text)
    assert json.loads(text) == expected
    writer.write({"step": 3, "eval_loss": 2.0, "eval_bits_per_byte": 1.1})
    assert read_metrics(path) == [expected, {"step": 3, "eval_loss": 2.0, "eval_bits_per_byte": 1.1}]
    writer.close()


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for writer in (MetricsWriter(path, False), MetricsWriter(None, True)):
        writer.write({"step": 1})
        writer.truncate_from(0)
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_file_is_that_of_an_unbroken_run(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken.jsonl", tmp_path / "whole.jsonl"
    filled(whole, range(10)).close()
    aborted = filled(broken, range(7))
    with broken.open("a") as file:
        file.write('{"step": 7, "lo')
    aborted.close()
    resumed = MetricsWriter(broken, True)
    resumed.truncate_from(4)
    assert [record["step"] for record in read_metrics(broken)] == [0, 1, 2, 3]
    for step in range(4, 10):
        resumed.write({"step": step, "loss": float(step)})
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "whole.jsonl"]


def test_truncation_while_writing_and_without_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, True).truncate_from(5)
    assert not path.exists()
    writer = filled(path, range(3))
    writer.truncate_from(1)
    writer.write({"step": 1})
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    writer.truncate_from(0)
    assert read_metrics(path) == []


def test_a_failed_truncation_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = filled(path, range(5))
    before = path.read_bytes()

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(ConfigError, match="No space left"):
                writer.truncate_from(2)
        assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 18))
def test_a_line_cut_anywhere_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    last = b'{"step": 2, "l": "\xc3\xa9"}\n'
    path.write_bytes(b'{"step": 1}\n' + last[:cut])
    assert read_metrics(path) == [{"step": 1}]
    MetricsWriter(path, True).write({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    MetricsWriter(path, True).write({"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [b"{", b"", b"[1]", b"7", b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": true}', b'{"step": 1.5}',
     b'{"step": 1, "loss": NaN}', b"\xff\xfe", b"\x00" * 20, b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_garbage_is_named_by_file_and_line(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    before = path.read_bytes()
    for use in (lambda: read_metrics(path), lambda: MetricsWriter(path, True).truncate_from(1)):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 ") as caught:
            use()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert path.read_bytes() == before


def test_missing_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl", True).write({"step": 1})


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; from megalowrank.engine.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]), True)\n"
        "for step in range(10**9): writer.write({'step': step}); print(step, flush=True)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, "-c", program, str(path)], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(200)]
        process.send_signal(signal.SIGKILL)
    steps = [record["step"] for record in read_metrics(path)]
    assert steps[:200] == seen and steps == list(range(len(steps)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(1000, 400, True, stream)
    for _ in range(2):
        progress.advance(50)
        progress.report(3.14159, 12345.6)
    progress.line("evaluation 2.5")
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert re.fullmatch(r"update  450/1000  loss 3\.1416  12,346 tokens/s  ETA \d+:\d\d:\d\d", first)
    assert second.startswith("update  500/1000  ") and third == "evaluation 2.5"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_eta_is_the_mean_speed_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(5000, 1000, True, stream)
    progress.report(1.0, 0.0)
    now[0] += 200.0
    progress.advance(100)
    progress.report(1.0, 0.0)
    unknown, known = stream.getvalue().splitlines()
    assert unknown.endswith("ETA ?")
    assert known.endswith("ETA 2:10:00")


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    progress = Progress(1000, 400, True, stream)
    progress.advance(100)
    progress.report(3.14159, 12345.6)
    progress.line("evaluation 2.5")
    progress.close()
    shown = stream.getvalue()
    assert "500/1000" in shown and "loss 3.1416, 12,346 tokens/s" in shown and "\r" in shown
    assert re.search(r"evaluation 2\.5\n", shown)


def test_progress_of_other_ranks_is_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(10, 0, False, stream)
        progress.advance()
        progress.report(1.0, 1.0)
        progress.line("x")
        progress.close()
        assert stream.getvalue() == ""
