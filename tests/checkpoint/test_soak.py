"""A small sample of the soak; ``python tools/soak_checkpoint.py`` does all of it."""

from __future__ import annotations

import json
import sys

from tests.front_door_cases import finish, start


def test_killed_here_and_there_a_run_goes_on_as_if_nothing_had_happened() -> None:
    words = "--random 3 --every 30 --updates 24 --seed 5 --no-damage --json"
    code, out, err = finish(start([sys.executable, "tools/soak_checkpoint.py", *words.split()]), timeout=280)
    assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"
    found = json.loads(out)
    assert found["checkpoints lost"] == 0 and found["kills at random moments"] == 3
    points = found["write points"]
    assert found["kills at write points"] == sum(map(len, points.values())) >= len(points) == 6
    assert found["resumed"] >= 6 and found["log lines equal"] >= 24
    kills = [point for seen in points.values() for point in seen]
    assert all(point.startswith(("before ", "halfway through ", "the end of the save")) for point in kills)
    assert len(set(kills)) > 3
