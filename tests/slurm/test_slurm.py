"""The job scripts on a real SLURM: whatever happens to a run, it ends COMPLETED with the curve of a calm one.

Run by ``make test-slurm``; a few minutes on two cores.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.corpus import TinyCorpus
from tests.front_door_cases import environment
from tests.slurm.cluster import Cluster, unavailable, wait_for
from tests.slurm.jobs import ITERS, NUMBERS, Job, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SCRIPT = "switchlora_1b"
MIDDLE = 12  # an update after the first checkpoint, far from the end


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Cluster(5) as found:
        yield found


@pytest.fixture(scope="module")
def calm(cluster: Cluster, tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Job]:
    """Undisturbed runs, by number of nodes."""
    folder = tmp_path_factory.mktemp("calm")
    jobs = {nodes: submit(cluster, SCRIPT, folder / f"on_{nodes}", tiny_corpus, nodes) for nodes in (2, 4)}
    for job in jobs.values():
        assert job.finish() == "COMPLETED", job.said()
    return jobs


def requeued(cluster: Cluster, job: Job) -> None:
    cluster.command("scontrol", "requeue", job.number)


def warned(cluster: Cluster, job: Job) -> None:
    cluster.command("scancel", "--batch", "--signal=USR1", job.number)


def rank_killed(cluster: Cluster, job: Job) -> None:
    os.kill(cluster.ranks(job.number)[-1], signal.SIGKILL)


def node_down(cluster: Cluster, job: Job) -> None:
    """An administrator, or a health check, takes out the first node."""
    cluster.change("NodeName", cluster.allocated(job.number)[0], "State=DOWN", "Reason=test")


def first_node_broken(cluster: Cluster, job: Job) -> None:
    node_broken(cluster, job, 0)


def node_broken(cluster: Cluster, job: Job, place: int = -1) -> None:
    """Power fails: daemon and ranks are gone without a word. The job goes on elsewhere."""
    cluster.break_node(cluster.allocated(job.number)[place], job.number)


ACCIDENTS: dict[Callable[[Cluster, Job], None], tuple[int, ...]] = {
    requeued: (2, 4), warned: (4, 2), rank_killed: (2, 4), node_down: (4, 2), node_broken: (2,),
    first_node_broken: (2, 4),
}  # fmt: skip
CASES = [
    pytest.param(nodes, accident, marks=[pytest.mark.every_cell] if at else [], id=f"{accident.__name__}-{nodes}")
    for accident, sizes in ACCIDENTS.items()
    for at, nodes in enumerate(sizes)
]


@pytest.mark.parametrize(("nodes", "accident"), CASES)
def test_a_disturbed_run_ends_with_the_curve_of_a_calm_one(
    nodes: int, accident: Callable[[Cluster, Job], None], cluster: Cluster, calm: dict[int, Job],
    tiny_corpus: TinyCorpus, tmp_path: Path,
) -> None:  # fmt: skip
    job = submit(cluster, SCRIPT, tmp_path / "run", tiny_corpus, nodes)
    job.reach(MIDDLE)
    accident(cluster, job)
    try:
        assert job.finish() == "COMPLETED", job.said()
    finally:
        cluster.cancel(job.number)
        cluster.repair()
    check_went_on(job)
    assert job.curve() == calm[nodes].curve()


def check_went_on(job: Job) -> None:
    """It was started more than once, went on from a checkpoint, and is marked as over."""
    assert job.starts() >= 2 and int(job.cluster.details(job.number)["Restarts"]) >= 1, job.said()
    assert "resumed at update" in job.said() and (job.run / "DONE").read_text() == f"{ITERS} updates\n"


def test_calm_curves_have_every_update_and_every_number(calm: dict[int, Job]) -> None:
    for job in calm.values():
        trained = [line for line in job.curve() if "loss" in line]
        assert [line["step"] for line in trained] == list(range(1, ITERS + 1))
        assert set(trained[0]) == set(NUMBERS) - {"eval_loss"} and "eval_loss" in job.curve()[-1]
        assert job.starts() == 1 and trained[-1]["loss"] < trained[0]["loss"]


def test_the_time_limit_is_announced_and_survived(
    cluster: Cluster, calm: dict[int, Job], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """SLURM itself sends USR1; one rank is held so that the run is not over before that."""
    job = submit(cluster, SCRIPT, tmp_path / "run", tiny_corpus, 2, "--signal=B:USR1@60")
    job.reach(MIDDLE)
    held = cluster.ranks(job.number)[1]
    os.kill(held, signal.SIGSTOP)
    hours, minutes, _ = cluster.details(job.number)["RunTime"].split(":")
    cluster.change("JobId", job.number, f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    wait_for(lambda: "USR1" in job.said(), 100, "SLURM announces the time limit")
    os.kill(held, signal.SIGCONT)
    cluster.change("JobId", job.number, "TimeLimit=UNLIMITED")
    assert job.finish() == "COMPLETED", job.said()
    check_went_on(job)
    assert job.curve() == calm[2].curve()


def test_a_finished_run_ends_at_once_when_it_is_queued_again(calm: dict[int, Job]) -> None:
    job, before = calm[2], calm[2].curve()
    job.cluster.command("scontrol", "requeue", job.number)
    assert job.finish(60) == "COMPLETED" and "this run is over" in job.said()
    assert job.curve() == before and job.starts() == 1


def test_a_mistake_is_not_tried_again(cluster: Cluster, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    job = submit(cluster, "full_1b", tmp_path / "run", tiny_corpus, 2, LR="-1")
    assert job.finish() == "FAILED" and job.starts() == 1, job.said()
    assert cluster.details(job.number)["ExitCode"] == "2:0" and "error: the learning rate" in job.said()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    job = submit(cluster, "lora_350m", tmp_path / "run", tiny_corpus, 2)
    wait_for(lambda: job.starts() == 1, 60, "the job starts")
    cluster.cancel(job.number)
    assert job.finish() == "CANCELLED"
    wait_for(lambda: "the ranks ended" in job.said(), 60, "the script ends")
    assert cluster.details(job.number)["JobState"] == "CANCELLED"


def test_every_gpu_of_the_nodes_gets_a_rank(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Files stand for the GPUs, a line of text for the program."""
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS is $SLURM_LOCALID"\n')
    program.chmod(0o755)
    with Cluster(2, gpus=2) as cluster:
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        job = submit(cluster, "full_1b", tmp_path / "run", tiny_corpus, 2, PATH=path)
        assert job.finish(60) == "COMPLETED", job.said()
    ranks = [f"rank {2 * node + local} of 4 is {local}" for node in (0, 1) for local in (0, 1)]
    assert sorted(line for line in job.said().splitlines() if line.startswith("rank")) == ranks


@pytest.mark.every_cell
def test_relora_goes_on_from_full_rank_and_lora_trains(
    cluster: Cluster, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    full = submit(cluster, "full_1b", tmp_path / "full", tiny_corpus, 2, TRAIN_ITERS="8", WARMUP="2")
    lora = submit(cluster, "lora_350m", tmp_path / "lora", tiny_corpus, 1)
    assert full.finish() == "COMPLETED", full.said()
    start = {"WARM_START": str(full.run / "checkpoints")}
    relora = submit(cluster, "relora_1b", tmp_path / "relora", tiny_corpus, 2, **start)
    for job in (lora, relora):
        assert job.finish() == "COMPLETED", job.said()
        assert [line["step"] for line in job.curve() if "loss" in line] == list(range(1, ITERS + 1))
    assert relora.curve()[0]["loss"] < full.curve()[0]["loss"] - 0.5, "it does not start from noise"


def test_the_launcher_of_deepspeed_inside_an_allocation(
    cluster: Cluster, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    log, run, ranks = tmp_path / "out", tmp_path / "run", tmp_path / "ranks"
    model = "--preset llama_9m --method relora --lora-rank 8 --relora-interval 2 --lr 1e-3 --eval-iters 0"
    length = f"--seq-length 32 --micro-batch-size 1 --train-iters 4 --output-dir {run}"
    words = f"--ds-config ds_configs/zero1.json {model} {length} {' '.join(tiny_corpus.flags())}"
    launcher = f"deepspeed --hostfile {ranks} --no_ssh_check --master_addr $(hostname) --launcher slurm"
    script = f"scontrol show hostnames | sed 's/$/ slots=1/' >{ranks} && {launcher} pretrain_llama.py {words}"
    env = environment(SLURM_CONF=cluster.env["SLURM_CONF"])
    job = cluster.command("sbatch", "--parsable", "--nodes=2", f"--output={log}", f"--wrap={script}", env=env)
    assert cluster.finish(job, 120) == "COMPLETED", log.read_text()
    assert "2 rank(s) on cpu" in log.read_text() and "update 4/4" in log.read_text()
