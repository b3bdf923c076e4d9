"""Jobs of a test cluster that run the shipped scripts on a tiny corpus."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpus import TinyCorpus
from tests.front_door_cases import environment
from tests.slurm.cluster import Cluster, wait_for

ITERS = 40
SETTINGS = {
    "PRESET": "llama_9m", "TRAIN_ITERS": str(ITERS), "SEQ_LENGTH": "32", "MICRO_BATCH": "1", "GLOBAL_BATCH": "4",
    "SPLIT": "80,20,0", "SAVE_INTERVAL": "8",
}  # fmt: skip
# what a curve must repeat; the rest of a line are times and memory
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "skipped", "switched_vectors", "eval_loss")


@dataclass(frozen=True)
class Job:
    """A submitted script; ``run`` is its output folder and ``log`` what it prints."""

    cluster: Cluster
    number: str
    run: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return []

    def curve(self) -> list[dict[str, Any]]:
        """Every number of the curve, which does not depend on how fast the machine is."""
        return [{key: line[key] for key in NUMBERS if key in line} for line in self.lines()]

    def reach(self, step: int, seconds: float = 180) -> None:
        """Wait for an update."""
        wait_for(lambda: self.said_step() >= step, seconds, f"update {step} of job {self.number}\n{self.said()}", 0.1)

    def said_step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def starts(self) -> int:
        """How often the script got as far as starting ranks."""
        return len(re.findall(r"start \d+ of job", self.said()))

    def finish(self, seconds: float = 240) -> str:
        """The state in which it ends."""
        try:
            return self.cluster.finish(self.number, seconds)
        except AssertionError as error:
            details = self.cluster.details(self.number)
            raise AssertionError(f"{error}\n{details}\n{self.said()[-4000:]}") from None


def submit(
    cluster: Cluster, script: str, run: Path, corpus: TinyCorpus, nodes: int, *options: str, **settings: str
) -> Job:
    """Hand a script of slurm/ to the cluster as a user does: with settings in the environment."""
    data = {"DATA": str(corpus.prefix), "TOKENIZER": str(corpus.tokenizer), "RUN": str(run)}
    log = run.with_suffix(".out")
    words = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", *options, f"slurm/{script}.sh"]
    env = environment(**{**SETTINGS, **data, **settings}, SLURM_CONF=cluster.env["SLURM_CONF"])
    return Job(cluster, cluster.command(*words, env=env), run, log)
