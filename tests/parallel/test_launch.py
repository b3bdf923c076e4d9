"""Who am I: every launcher's environment, node lists, and environments that are half set."""

from __future__ import annotations

import socket

import pytest

from megalowrank.errors import ConfigError
from megalowrank.parallel.launch import first_host, free_port, set_rank_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
MASTER = {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}


def slurm(**more: str) -> dict[str, str]:
    """Task 5 of 8 on two nodes, as srun sets it."""
    return {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NODELIST": "gpu[03-05,07-08]",
        "SLURM_JOB_ID": "654321",
        **more,
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[9,03-05]", "gpu9"),
        ("gpu[03-05,9],login", "gpu03"),
        ("a,b", "a"),
        ("node-1", "node-1"),
        ("node-1,node-2", "node-1"),
        ("node-[1-2]", "node-1"),
        ("gpu[001]", "gpu001"),
        ("gpu[1-2]-ib,login", "gpu1-ib"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("localhost", "localhost"),
        ("10.0.0.7", "10.0.0.7"),
        (" a,b\n", "a"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", " ", ",a", "[", "a[", "a]", "a[]"])
def test_what_is_no_node_list(nodes: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST is not a node list"):
        first_host(nodes)


def test_deepspeed_and_torchrun_are_taken_as_they_are() -> None:
    deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER}
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}
    for env in (dict(deepspeed), dict(torchrun), {**slurm(), **deepspeed}):
        assert set_rank_environment(env) == (3, 4, 1)
        assert {name: env[name] for name in NAMES} == deepspeed


def test_local_variables_have_defaults() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", **MASTER}
    assert set_rank_environment(env) == (0, 2, 0)
    assert (env["LOCAL_RANK"], env["LOCAL_SIZE"]) == ("0", "2")


def test_slurm() -> None:
    env = slurm()
    assert set_rank_environment(env) == (5, 8, 1)
    assert [env[name] for name in NAMES[:5]] == ["5", "8", "1", "4", "gpu07"]
    assert env["MASTER_PORT"] == "34321"


@pytest.mark.parametrize(("tasks", "local"), [("4(x2)", "4"), ("3,1", "3"), ("2(x3),1", "2"), ("8", "8")])
def test_tasks_per_node(tasks: str, local: str) -> None:
    env = slurm(SLURM_STEP_TASKS_PER_NODE=tasks)
    set_rank_environment(env)
    assert env["LOCAL_SIZE"] == local


def test_slurm_leaves_a_chosen_address_alone() -> None:
    env = slurm(MASTER_ADDR="ib0", MASTER_PORT="1234")
    set_rank_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("ib0", "1234")


def test_all_tasks_of_a_step_agree_on_the_address_and_jobs_do_not_share_a_port() -> None:
    steps = [slurm(SLURM_PROCID=str(rank)) for rank in range(8)]
    assert [set_rank_environment(env)[0] for env in steps] == list(range(8))
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in steps}) == 1
    ports = set()
    for job in range(654321, 654421):
        env = slurm(SLURM_JOB_ID=str(job))
        set_rank_environment(env)
        assert 1024 < int(env["MASTER_PORT"]) < 65536
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 100


def test_without_a_step_node_list_the_job_counts() -> None:
    env = slurm()
    del env["SLURM_STEP_NODELIST"]
    set_rank_environment(env)
    assert env["MASTER_ADDR"] == "gpu03"


def test_inside_a_batch_script_without_srun_it_is_one_process() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    assert set_rank_environment(env) == (0, 1, 0)
    assert env["MASTER_ADDR"] == "127.0.0.1"


def test_a_plain_process_is_alone_on_a_free_port() -> None:
    env: dict[str, str] = {}
    assert set_rank_environment(env) == (0, 1, 0)
    assert env["OMP_NUM_THREADS"] == "1" and set(NAMES) < set(env)
    with socket.socket() as probe:
        probe.bind((env["MASTER_ADDR"], int(env["MASTER_PORT"])))
    assert set_rank_environment(env) == (0, 1, 0), "asking again changes nothing"
    assert 1024 < free_port() < 65536


def test_threads_that_were_chosen_stay() -> None:
    env = {"OMP_NUM_THREADS": "6"}
    set_rank_environment(env)
    assert env["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "1", **MASTER}, "RANK and WORLD_SIZE must both be set; got RANK=1 WORLD_SIZE=None"),
        ({"WORLD_SIZE": "2", **MASTER}, "RANK and WORLD_SIZE must both be set; got RANK=None WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MASTER}, "RANK is not a number; got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "", **MASTER}, "WORLD_SIZE is not a number; got ''"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MASTER}, "RANK is not a number; got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "gpu", **MASTER}, "LOCAL_RANK is not a number; got 'gpu'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK is not below WORLD_SIZE; got RANK=2 WORLD_SIZE=2"),
        (slurm(SLURM_STEP_NODELIST=","), "SLURM_JOB_NODELIST is not a node list"),
    ],
)
def test_half_an_environment_is_refused_by_name(env: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        set_rank_environment(dict(env))
    assert str(caught.value).startswith(named)
