"""``deepspeed --launcher pdsh`` over two hosts trains what two ranks on one host do. Run by ``make test-slurm``."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalowrank.parallel.launch import free_port
from tests.corpus import TinyCorpus
from tests.front_door_cases import BIN, PROGRAM, environment, succeed, training
from tests.slurm.hosts import Hosts, unavailable

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
MODEL = "--preset llama_9m --method switchlora --lora-rank 8 --switch-interval 10 --seq-length 32 --micro-batch-size 1"
TRAIN = "--ds-config ds_configs/zero2.json --global-batch-size 4 --train-iters 6 --lr 1e-2 --log-interval 1"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", 2) as found:
        yield found


def test_two_hosts_train_what_one_does(hosts: Hosts, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    words = [PROGRAM, *f"{MODEL} {TRAIN} --eval-iters 0".split(), *tiny_corpus.flags(), "--output-dir"]
    local = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    succeed([*local, *words, str(tmp_path / "local")])

    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    remote = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check", "--master_addr", hosts.addresses[0]]
    command = [str(BIN / "deepspeed"), *remote, "--launcher", "pdsh", *words, str(tmp_path / "remote")]
    ssh = f"-F {hosts.base}/ssh_config"
    env = environment(PDSH_SSH_ARGS_APPEND=ssh, DS_ENV_FILE=str(tmp_path / "environment"))
    command = hosts.on(hosts.names[0], *command)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"{name}: " in done.stdout for name in hosts.names[:1]) and "2 rank(s) on cpu" in done.stdout
    assert [line["loss"] for line in training(tmp_path / "remote")] == [
        line["loss"] for line in training(tmp_path / "local")
    ]
