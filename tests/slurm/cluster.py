"""A real SLURM on this machine: slurmctld, one slurmd per node and a munged of its own, brought up and taken down.

Every node has a name, a loopback address and a port; nothing outside the folder of the cluster changes but a block of
/etc/hosts, which goes with it. Several such clusters, and one that the machine has anyway, do not meet.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.harness import ROOT

HOSTS = Path("/etc/hosts")
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
CPUS, MEMORY = 4, 4000
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))  # where daemons lie, in no user's path


def unavailable() -> str:
    """Why no cluster can be started here; empty if it can. Missing packages are installed where that is allowed."""
    if os.geteuid() != 0:
        return "SLURM daemons of one's own need root"
    if not os.access(HOSTS, os.W_OK):
        return "/etc/hosts cannot be written"
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program, path=SEARCHED)]
    if missing and not (shutil.which("apt-get") and install(missing)):
        return f"not installed: {' '.join(missing)}"
    return ""


def install(packages: list[str]) -> bool:
    """Whether apt could install these Debian packages."""
    quiet = subprocess.DEVNULL
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")  # 1: services are not started
    get = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    for command in (get, ["apt-get", "update"], get):
        if subprocess.run(command, env=env, stdout=quiet, stderr=quiet, timeout=300).returncode == 0 and command is get:
            return True
    return False


def wait_for(condition: Callable[[], bool], seconds: float, what: str, step: float = 0.2) -> None:
    """Return when ``condition`` holds; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(step)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside the range that the kernel gives away."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(9000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


class Cluster:
    """``size`` nodes; ``gpus`` of each are files that stand for devices. Use it as a context.

    A node that does not answer for ``patience`` seconds is down. ``base`` has all files until the end; it lies in the
    system's folder for such, because the names of sockets must be short.
    """

    def __init__(self, size: int, gpus: int = 0, patience: int = 15) -> None:
        self.gpus, self.patience = gpus, patience
        self.base = base = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.tag = secrets.token_hex(3)
        self.nodes = [f"n{self.tag}x{number}" for number in range(1, size + 1)]
        self.first_job = 1000 + secrets.randbelow(60000)
        self.env = dict(os.environ, PATH=SEARCHED, SLURM_CONF=str(base / "slurm.conf"))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------ up and down

    def __enter__(self) -> Cluster:
        for folder in ("state", "spool", "log", "run", "dev"):
            (self.base / folder).mkdir()
        self.base.chmod(0o755)
        try:
            self._munge()
            self._names(self.nodes)
            self._configure(free_ports(len(self.nodes) + 1))
            self._start("slurmctld", "slurmctld", "-D", "-i")
            self.repair()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, end the daemons and what they have left, restore /etc/hosts."""
        with contextlib.suppress(OSError, subprocess.SubprocessError, AssertionError):
            self.command("scancel", "--user=root")
            wait_for(lambda: not self.command("squeue", "--noheader"), 15, "the last job ends")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        for pid, _ in self._ours():
            kill(pid)
        self._names([])
        shutil.rmtree(self.base, ignore_errors=True)

    def repair(self) -> None:
        """Start the slurmd of every node that has none, resume those that are down, and wait until all are idle."""
        for node in self.nodes:
            if node not in self.daemons or self.daemons[node].poll() is not None:
                self._start(node, "slurmd", "-D", "-N", node)
            elif self.command("sinfo", "--noheader", f"--nodes={node}", "--format=%t").startswith("d"):  # down, drained
                self.change("NodeName", node, "State=RESUME")
        try:
            wait_for(lambda: self.idle() == len(self.nodes), 90, f"{len(self.nodes)} idle nodes")
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted((self.base / "log").glob("*.log")))
            raise AssertionError(f"{error}\n{logs}") from None

    def _start(self, name: str, *command: str) -> None:
        log = (self.base / "log" / f"{name}.out").open("ab")
        words = ["setpriv", "--pdeathsig", "KILL", *command]  # no daemon outlives these tests, however they end
        self.daemons[name] = subprocess.Popen(
            words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _munge(self) -> None:
        """Keys and socket of our own, so that a munged of the machine is neither needed nor disturbed."""
        folder = self.base / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        wait_for((folder / "socket").exists, 20, "munged")

    def _names(self, nodes: list[str]) -> None:
        """Nodes resolve to addresses of their own, as on a cluster; written in place, the file may be mounted."""
        begin, end = f"# slurm test {self.tag}\n", f"# end of slurm test {self.tag}\n"
        before, found, rest = HOSTS.read_text().partition(begin)
        text = before + rest.partition(end)[2] if found else before
        if nodes:
            text = text.rstrip("\n") + "\n" + begin
            text += "".join(f"{self._address(node)} {node}\n" for node in nodes) + end
        HOSTS.write_text(text)

    def _address(self, node: str) -> str:
        return f"127.0.{1 + int(self.tag, 16) % 250}.{1 + self.nodes.index(node)}"

    def _configure(self, ports: list[int]) -> None:
        host, base = socket.gethostname().split(".")[0], self.base
        resources = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = [
            f"ClusterName=c{self.tag}",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"AuthInfo=socket={base}/munge/socket",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={base}/state",
            f"SlurmdSpoolDir={base}/spool/%n",
            f"SlurmctldPidFile={base}/run/slurmctld.pid",
            f"SlurmdPidFile={base}/run/%n.pid",
            f"SlurmctldLogFile={base}/log/slurmctld.log",
            f"SlurmdLogFile={base}/log/%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/none",
            "ReturnToService=1",
            "KillWait=20",
            "MinJobAge=3600",
            f"SlurmdTimeout={self.patience}",
            "SlurmdParameters=config_overrides",
            f"FirstJobId={self.first_job}",
        ]
        if self.gpus:
            devices = [base / "dev" / f"gpu{number}" for number in range(self.gpus)]
            for device in devices:
                device.touch()
            (base / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={base}/dev/gpu[0-{self.gpus - 1}]\n")
            lines.append("GresTypes=gpu")
        for node, port in zip(self.nodes, ports[1:], strict=True):
            place = f"NodeHostname={host} NodeAddr={self._address(node)} Port={port}"
            lines.append(f"NodeName={node} {place} CPUs={CPUS} RealMemory={MEMORY} {resources} State=UNKNOWN")
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (base / "slurm.conf").write_text("\n".join(lines) + "\n")

    # ------------------------------------------------------------ use

    def command(self, *words: str, env: dict[str, str] | None = None) -> str:
        """What a SLURM command prints; AssertionError if it fails."""
        done = subprocess.run(words, env=env or self.env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def idle(self) -> int:
        """Nodes that wait for work."""
        try:
            return self.command("sinfo", "--noheader", "-N", "--format=%t").split().count("idle")
        except AssertionError:
            return 0

    def details(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def allocated(self, job: str) -> list[str]:
        """The nodes a job runs on, first node first."""
        return self.command("scontrol", "show", "hostnames", self.details(job)["NodeList"]).split()

    def change(self, kind: str, name: str, *settings: str) -> None:
        """``scontrol update`` of a job (``JobId``) or a node (``NodeName``)."""
        self.command("scontrol", "update", f"{kind}={name}", *settings)

    def finish(self, job: str, seconds: float) -> str:
        """The state in which a job ends; what is queued again waits for 5 seconds, not for SLURM's two minutes.

        Without any wait, SLURM would start it with what it is still taking down of the last start.
        """
        last, hastened = "", set()

        def ended() -> bool:
            nonlocal last
            found = self.details(job)
            last = found["JobState"]
            if last == "PENDING" and found["Reason"] == "BeginTime" and found["Restarts"] not in hastened:
                hastened.add(found["Restarts"])
                self.change("JobId", job, "StartTime=now+5")
            return last not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

        wait_for(ended, seconds, f"the end of job {job}", step=0.5)
        return last

    def cancel(self, job: str) -> None:
        """Take a job out of the queue, if it is there."""
        with contextlib.suppress(AssertionError):
            self.command("scancel", job)

    # ------------------------------------------------------------ accidents

    def ranks(self, job: str) -> list[int]:
        """Processes of a job's ranks, by rank."""
        found = [(int(env["SLURM_PROCID"]), pid) for pid, env in self._ours(job) if env.get("SLURM_STEP_ID") == "0"]
        return [pid for _, pid in sorted(found)]

    def break_node(self, node: str, job: str) -> None:
        """Kill everything of a node at once: its slurmd, what a job has there, and what looks after that."""
        victims = [pid for pid, env in self._ours(job) if env.get("SLURMD_NODENAME") == node]
        keepers = {parent(pid) for pid in victims} - {1}
        self.daemons[node].kill()
        for pid in [*keepers, *victims]:
            kill(pid)
        self.daemons[node].wait()

    def _ours(self, job: str | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """Processes of this cluster's jobs, or of one, with their environment."""
        for pid, env in environments():
            known = env.get("SLURM_CONF") == self.env["SLURM_CONF"]
            if known and job in (None, env.get("SLURM_JOB_ID")):
                yield pid, env


def parent(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Every process but this one, with its environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                entries = (folder / "environ").read_text(errors="replace").split("\0")
                yield int(folder.name), dict(entry.split("=", 1) for entry in entries if "=" in entry)


def kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
