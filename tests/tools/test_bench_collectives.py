"""The counted collectives of a block are those one can work out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, FFN, RANK, LENGTH, BATCH, TWICE, FLOAT = 16, 21, 4, 8, 3, 2, 4
TOKENS = LENGTH * BATCH
FLAGS = ["--hidden-size", HIDDEN, "--ffn-hidden-size", FFN, "--lora-rank", RANK, "--seq-length", LENGTH]
FLAGS += ["--micro-batch-size", BATCH, "--micro-batches", TWICE]
COLUMN, ROW = {"qkv": 3 * RANK, "gate_up": 2 * RANK}, {"o": RANK, "down": RANK}
"""Sum of the ranks of a fused projection; all collectives are HIDDEN wide, whatever FFN is."""
Counts = dict[tuple[str, str, str, str], tuple[int, int]]


def bench(*flags: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/bench_collectives.py", *map(str, (*FLAGS, *flags))]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def by_hand(sequence: bool) -> Counts:
    """(calls, elements) per step of everything but the naive adapter and the sums over layers."""
    found: Counts = {}
    for layer, narrow in {**COLUMN, **ROW}.items():
        ways = {"backward": "all-reduce"} if layer in COLUMN else {"forward": "all-reduce"}
        if sequence:
            ways = {"forward": "all-gather", "backward": "reduce-scatter"}
            ways = ways if layer in COLUMN else dict(zip(ways, reversed(ways.values()), strict=True))
        for variant, extra in (("base", 0), ("partial", 0), ("ride", narrow)):
            for way, name in ways.items():
                found[layer, variant, way, name] = (TWICE, TWICE * TOKENS * (HIDDEN + extra))
            if variant == "partial" or (sequence and variant == "ride"):
                found[layer, variant, "step", "all-reduce"] = (1, narrow * HIDDEN)
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_counts(sequence: bool) -> None:
    done = bench("--json", *(["--sequence-parallel"] if sequence else []))
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    assert table[0].split()[:3] == ["layer", "variant", "forward"] and len(table) == 1 + 5 * 4 + 1
    counts = json.loads(last)["counts"]
    found = {
        (one["layer"], one["variant"], one["direction"], one["collective"]): (one["calls"], one["bytes"] // FLOAT)
        for one in counts
    }
    ours = {key: value for key, value in found.items() if key[0] != "block" and key[1] != "naive"}
    assert ours == by_hand(sequence)
    calls = {
        variant: sum(value[0] for key, value in found.items() if key[:2] == ("block", variant) and key[2] != "step")
        for variant in ("base", "ride", "partial", "naive")
    }
    base = TWICE * (8 if sequence else 4)
    assert calls == {"base": base, "ride": base, "partial": base, "naive": base * (3 if sequence else 4)}
    for one in counts:
        assert one["sent"] * 2 == one["bytes"] * (2 if one["collective"] == "all-reduce" else 1)


def test_a_rank_that_the_naive_adapter_cannot_split() -> None:
    refused = bench("--lora-rank", 3)
    assert refused.returncode == 2 and "--lora-rank" in refused.stderr and "Traceback" not in refused.stderr
