"""Hosts on this machine: network namespaces on one bridge, each with an address, a name and an sshd of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from tests.slurm.cluster import SEARCHED, install, kill, wait_for

PACKAGES = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2"}


def unavailable() -> str:
    """Why no hosts can be made here; empty if they can. Missing packages are installed where that is allowed."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program, path=SEARCHED)]
    if missing and not (shutil.which("apt-get") and install(missing)):
        return f"not installed: {' '.join(missing)}"
    probe = f"probe{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, timeout=30)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else ""


class Hosts:
    """``size`` hosts that reach each other by name over ssh; their files lie in ``base``. Use it as a context."""

    def __init__(self, base: Path, size: int) -> None:
        self.base, tag = base, secrets.token_hex(3)
        self.bridge, self.names = f"b{tag}", [f"h{tag}x{number}" for number in range(1, size + 1)]
        self.addresses = [f"10.77.0.{number}" for number in range(1, size + 1)]
        self.servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self.base.mkdir()
        for key in ("user", "server"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / key)]
            subprocess.run(command, check=True, timeout=30)
        (self.base / "ssh_config").write_text(
            f"IdentityFile {self.base}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        try:
            self._connect()
            for name, address in zip(self.names, self.addresses, strict=True):
                self._serve(name, address)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers and what runs on the hosts, and remove the namespaces."""
        for server in self.servers:
            server.terminate()
            server.wait(10)
        for name in [*self.names, self.bridge]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30)
            for pid in inside.stdout.split():
                kill(int(pid))
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def on(self, name: str, *words: str) -> list[str]:
        """The command that runs ``words`` on a host, which then has that name and its own /etc/hosts."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *words]
        return ["ip", "netns", "exec", name, *named]

    def _connect(self) -> None:
        """Namespaces, each with a cable to the bridge, which lies in one of its own."""
        ip("netns", "add", self.bridge)
        ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.bridge, "link", "set", "bridge", "up")
        table = "".join(f"{address} {name}\n" for name, address in zip(self.names, self.addresses, strict=True))
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + table)
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self.bridge)
            ip("-n", self.bridge, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")

    def _serve(self, name: str, address: str) -> None:
        """Start the sshd of a host; it takes the user's key."""
        settings = {
            "ListenAddress": address, "HostKey": self.base / "server", "AuthorizedKeysFile": self.base / "user.pub",
            "PermitRootLogin": "prohibit-password", "PasswordAuthentication": "no", "StrictModes": "no", "UsePAM": "no",
            "PidFile": self.base / f"{name}.pid",
        }  # fmt: skip
        config = self.base / f"sshd_{name}"
        config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        daemon = ["setpriv", "--pdeathsig", "KILL", shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f"]
        with (self.base / f"{name}.log").open("wb") as log:
            server = subprocess.Popen(self.on(name, *daemon, str(config)), stdout=log, stderr=log)
        self.servers.append(server)
        wait_for((self.base / f"{name}.pid").exists, 20, f"sshd of {name}")


def ip(*words: str) -> None:
    """The command of this name."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
