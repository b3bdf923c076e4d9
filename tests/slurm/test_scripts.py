"""The job scripts without a cluster: what they start, and what follows; SLURM's commands are stubs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megalowrank.cli import RunConfig, parse
from megalowrank.engine.setup import resolve_run
from megalowrank.errors import EXIT_FAILED, EXIT_HUNG, EXIT_MISTAKE, EXIT_PEER, EXIT_STOPPED
from megalowrank.methods import METHODS
from megalowrank.models.presets import apply_preset
from tests.front_door_cases import environment
from tests.harness import ROOT
from tests.slurm.cluster import wait_for

CODES = {0, EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED, EXIT_HUNG, EXIT_PEER}
SCRIPTS = ("switchlora_1b", "full_1b", "relora_1b", "lora_350m")
CONFIGS = {name: method.config_class for name, method in METHODS.items()}
# of SLURM, what a script sees of it: the ranks, the queue, and being ended when it is queued again
STUBS = {
    "srun": "printf '%s\\0' \"$@\" >$SEEN/srun; env -0 >$SEEN/env; echo start >>$SEEN/starts\n"
    '[ "$HOLD" = deaf ] || trap \'exit 75\' USR1; [ -z "$HOLD" ] || for _ in {1..100}; do sleep 0.1; done; exit $CODE',
    "squeue": "echo $STATE",
    "scontrol": 'echo "$@" >>$SEEN/scontrol; kill -TERM $PPID',
}


@dataclass
class Desk:
    """Where scripts are tried; ``seen`` has what the stubs were called with."""

    seen: Path
    path: str

    def start(self, script: str, **settings: str) -> subprocess.Popen[str]:
        """A script as SLURM starts it on the first of two nodes."""
        job = {
            "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": script, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "64",
            "RUN": str(self.seen / "run"), "SEEN": str(self.seen), "CODE": "0", "STATE": "RUNNING", "HOLD": "",
        }  # fmt: skip
        env = environment(**{**job, "PATH": self.path, **settings})
        pipe, command = subprocess.PIPE, ["bash", f"slurm/{script}.sh"]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, script: str, **settings: str) -> tuple[int, str]:
        """Its exit code and what it prints."""
        process = self.start(script, **settings)
        said, _ = process.communicate(timeout=30)
        return process.returncode, said

    def words(self) -> list[str]:
        """What srun was given, without the end of the last word."""
        return (self.seen / "srun").read_text().split("\0")[:-1]

    def environment(self) -> dict[str, str]:
        """What the ranks have."""
        entries = (self.seen / "env").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if entry)

    def requeued(self) -> int:
        """How often the job was put back into the queue."""
        calls = self.seen / "scontrol"
        return calls.read_text().splitlines().count("requeue 77") if calls.exists() else 0


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in STUBS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    return Desk(tmp_path, f"{tools}{os.pathsep}{os.environ['PATH']}")


def flags(desk: Desk) -> RunConfig:
    """What the program would read, by its own parser."""
    words = desk.words()
    start = words.index("pretrain_llama.py")
    assert words[start - 1] == "python"
    return parse(words[start + 1 :], CONFIGS, "pretrain_llama.py")


# ---------------------------------------------------------------- what is started


@pytest.mark.parametrize("script", [*SCRIPTS, "common"])
def test_a_script_is_short_and_is_bash(script: str) -> None:
    path = ROOT / "slurm" / f"{script}.sh"
    lines = path.read_text().splitlines()
    assert subprocess.run(["bash", "-n", str(path)], timeout=30).returncode == 0
    assert len(lines) <= (60 if script in SCRIPTS else 120) and max(map(len, lines)) <= 120
    assert not re.search(r"\bssh\b", path.read_text())


def test_all_scripts_are_here() -> None:
    assert {path.name for path in (ROOT / "slurm").iterdir()} == {f"{name}.sh" for name in (*SCRIPTS, "common")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_slurm_is_asked_for(script: str) -> None:
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    asked = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {f"--job-name={script}", "--requeue", "--open-mode=append", "--exclusive"} <= set(asked)
    assert "--signal=B:USR1@300" in asked and text.index("#SBATCH") < text.index("source")


# preset, updates, learning rate, sample length, samples, numbers of GPUs, and flags of the method
PUBLISHED: dict[str, tuple[str, int, float, int, int, tuple[int, ...], dict[str, float]]] = {
    "switchlora_1b": (
        "llama_1b", 40000, 2e-2, 512, 1152, (16, 32),
        {"lora_rank": 512, "switch_interval": 40, "switch_descent_rate": 0.1, "switch_freeze_steps": 5},
    ),
    "full_1b": ("llama_1b", 40000, 1e-3, 512, 1152, (16, 32), {}),
    "lora_350m": ("llama_350m", 40000, 1e-2, 512, 1152, (8, 16), {"lora_rank": 256, "lora_alpha": 1.0}),
    "relora_1b": (
        "llama_1b", 130000, 4e-4, 2048, 1024, (16, 32),
        {"lora_rank": 128, "relora_interval": 1000, "relora_prune_ratio": 0.8, "lora_alpha": 32.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_published_run_on_nodes_of_eight_gpus(script: str, desk: Desk) -> None:
    assert desk.run(script, SLURM_GPUS_ON_NODE="8")[0] == 0
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"} <= set(desk.words())
    config = flags(desk)
    train, (*numbers, worlds, method) = config.train, PUBLISHED[script]
    found = [config.model.preset, train.train_iters, train.lr, train.seq_length, train.global_batch_size]
    assert found == numbers and method.items() <= vars(config.method_config).items()
    assert train.bf16 and train.clip_grad == 1.0 and train.adam_beta2 == (0.95 if script == "relora_1b" else 0.999)
    model = apply_preset(config.model, None, train.seq_length, ("llama",))
    for world in worlds:
        resolve_run(config, model, world)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_trial_on_two_nodes_without_gpus(script: str, desk: Desk) -> None:
    assert desk.run(script, PRESET="llama_9m")[0] == 0
    words, config = desk.words(), flags(desk)
    assert "--ntasks-per-node=1" in words and not any(word.startswith("--gpus") for word in words)
    assert config.model.preset == "llama_9m" and config.train.train_iters == 40 and not config.train.bf16
    assert (config.output.load, config.output.save) == ("auto", f"{desk.seen}/run/checkpoints")
    resolve_run(config, apply_preset(config.model, 2048, config.train.seq_length, ("llama",)), 2)


def test_settings_of_the_environment_win(desk: Desk) -> None:
    given = {"PRESET": "llama_60m", "LR": "3e-3", "LORA_RANK": "24", "TOKENIZER": "t.model"}
    desk.run("switchlora_1b", **given, DATA="0.7 data/a 0.3 data/b", SLURM_NTASKS_PER_NODE="4")
    config = flags(desk)
    assert (config.model.preset, config.train.lr, config.method_config.lora_rank) == ("llama_60m", 3e-3, 24)
    assert config.data.data_path == ["0.7", "data/a", "0.3", "data/b"] and config.data.tokenizer_model == "t.model"
    assert config.train.train_iters == 40000 and "--ntasks-per-node=4" in desk.words()


def test_relora_may_start_from_full_rank(desk: Desk) -> None:
    desk.run("relora_1b", WARM_START="runs/full/checkpoints")
    output = flags(desk).output
    assert (output.load, output.finetune) == ("runs/full/checkpoints", True)


def test_every_start_has_a_port_of_its_own_and_nothing_of_the_shell(desk: Desk) -> None:
    ports = set()
    for job in ("77", "78", "4000000"):
        for restart in ("0", "1", "2"):
            desk.run("full_1b", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart, RANK="3", WORLD_SIZE="9", CODE="2")
            env = desk.environment()
            ports.add(int(env["MASTER_PORT"]))
            assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(env)
    assert len(ports) == 9 and min(ports) >= 20000 and max(ports) < 32000


def test_the_documentation_has_every_setting() -> None:
    scripts = "".join((ROOT / "slurm" / f"{name}.sh").read_text() for name in (*SCRIPTS, "common"))
    document = (ROOT / "docs" / "slurm.md").read_text()
    (table,) = re.findall(r"^## Settings\n(.*?)^## ", document, re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(re.findall(r"^ *setting (\w+)", scripts, re.MULTILINE))
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", document, re.MULTILINE)} == CODES


# ---------------------------------------------------------------- what follows


def test_a_finished_run_is_marked_and_never_started_again(desk: Desk) -> None:
    assert desk.run("full_1b")[0] == 0 and (desk.seen / "run" / "DONE").read_text() == "40000 updates\n"
    assert desk.run("full_1b", SLURM_RESTART_COUNT="1", CODE="1")[0] == 0
    assert (desk.seen / "starts").read_text() == "start\n" and desk.requeued() == 0


@pytest.mark.parametrize(("code", "again"), [("1", 1), ("2", 0), ("75", 1), ("76", 1), ("77", 1), ("137", 1)])
def test_what_follows_from_an_exit_code(code: str, again: int, desk: Desk) -> None:
    assert desk.run("full_1b", CODE=code)[0] == int(code)
    assert desk.requeued() == again and not (desk.seen / "run" / "DONE").exists()


def test_failures_without_progress_are_counted(desk: Desk) -> None:
    latest = desk.seen / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)

    def fail(restart: int, newest: str = "") -> int:
        if newest:
            latest.write_text(newest + "\n")
        desk.run("full_1b", CODE="77", MAX_RESTARTS="2", SLURM_RESTART_COUNT=str(restart))
        return desk.requeued()

    assert [fail(0), fail(1), fail(2), fail(3)] == [1, 2, 2, 2], "the third failure at one place is the last"
    assert [fail(4, "step_00000010"), fail(5), fail(6)] == [3, 4, 4], "a new checkpoint is progress"
    assert fail(0) == 5, "who submits it again starts afresh"


def test_a_stop_is_no_failure(desk: Desk) -> None:
    for restart in range(6):
        desk.run("full_1b", CODE="75", MAX_RESTARTS="1", SLURM_RESTART_COUNT=str(restart))
    assert desk.requeued() == 6


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_slurm_has_taken_in_hand_is_left_to_it(state: str, desk: Desk) -> None:
    assert desk.run("full_1b", CODE="75", STATE=state)[0] == 75 and desk.requeued() == 0


def test_a_warning_reaches_the_ranks(desk: Desk) -> None:
    process = desk.start("full_1b", HOLD="1", MAX_RESTARTS="0")
    wait_for((desk.seen / "starts").exists, 20, "srun is started")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "the ranks ended with 75 after USR1" in said and desk.requeued() == 1


def test_ranks_that_a_warning_kills_are_no_failure(desk: Desk) -> None:
    """It comes while Python still starts: nobody listens yet."""
    process = desk.start("full_1b", HOLD="deaf", MAX_RESTARTS="0")
    wait_for((desk.seen / "starts").exists, 20, "srun is started")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 138 and desk.requeued() == 1 and not (desk.seen / "run" / "failures").exists()


def test_started_from_elsewhere_it_says_so(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "slurm" / "full_1b.sh")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "slurm/common.sh" in done.stderr
