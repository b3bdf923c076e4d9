"""Any amount of text to token files: parts by several processes, kept over a kill, joined in order.

Beside the result lies ``PREFIX.parts`` while it is being made: the plan, and for every finished part a spool
with its record. The result depends on the inputs, the tokenizer and the settings of ``Job`` other than
``workers``: not on the number of processes, and not on how often a run was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalowrank import __version__
from megalowrank.data.files import file_sha256, write_whole
from megalowrank.data.index import token_dtype
from megalowrank.data.manifest import load_manifest, manifest_of, manifest_path, write_manifest
from megalowrank.data.parts import PartTask, Progress, SpoolRecord, finish_parts
from megalowrank.data.prepare import end_of_text
from megalowrank.data.sources import Source
from megalowrank.data.spool import ENDINGS, join
from megalowrank.data.tokenizers import load_tokenizer, tokenizer_sha256
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError

PART_BYTES = 16 << 20
_PACKAGES = {
    "SentencePieceProcessor": ("sentencepiece",),
    "HuggingFaceTokenizer": ("tokenizers", "transformers"),
    "Parquet": ("pyarrow",),
    "SavedDataset": ("datasets",),
    "HubDataset": ("datasets",),
}


@dataclass(frozen=True)
class Job:
    """What to make. ``source`` goes into the manifest beside what is found out about the inputs."""

    sources: Sequence[Source]
    prefix: str
    tokenizer: str
    tokenizer_type: str | None = None
    append_eod: bool = True
    part_bytes: int = PART_BYTES
    workers: int = 1
    source: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Where the parts are kept."""
        return Path(f"{self.prefix}.parts")


def preprocess(job: Job, progress: Callable[[Progress], None] = lambda state: None, overwrite: bool = False) -> bool:
    """Make ``prefix.bin``, ``.idx``, ``.sizes`` and ``.json``; False if they were there already.

    Finished parts of an earlier run with the same inputs and settings are verified by hash and kept.
    ConfigError for bad inputs, for parts or a result made from something else (unless ``overwrite``), and
    while another process makes the same files. TrainingError if a worker process dies.
    """
    if job.workers < 1:
        raise ConfigError("--workers is out of range", job.workers, ">= 1")
    with errors_of_files(job.prefix):
        source, state = _plan(job)
        if _is_complete(job, source):
            shutil.rmtree(job.folder, ignore_errors=True)
            return False
        if not overwrite and manifest_path(job.prefix).exists():
            raise ConfigError(
                f"{job.prefix}.json is there, made from something else", None, "another --output-prefix, or --overwrite"
            )
        job.folder.mkdir(parents=True, exist_ok=True)
        with _only_one(job.folder):
            _open_plan(job.folder, {**source, "state": state}, overwrite)
            _make(job, source, progress)
        shutil.rmtree(job.folder)
    return True


def _plan(job: Job) -> tuple[dict[str, Any], list[Any]]:
    """The manifest's ``source``, and what else must stay the same while parts are made."""
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    if job.append_eod:
        end_of_text(tokenizer, job.tokenizer)
    kinds = {type(found).__name__ for found in (tokenizer, *job.sources)}
    packages = sorted({package for kind in kinds for package in _PACKAGES.get(kind, ())})
    source = {
        **(job.source or {}),
        "inputs": [source.describe() for source in job.sources],
        "tokenizer": {"type": type(tokenizer).__name__, "sha256": tokenizer_sha256(job.tokenizer, tokenizer)},
        "append_eod": job.append_eod,
        "part_bytes": job.part_bytes,
        "versions": {"megalowrank": __version__, **{package: version(package) for package in packages}},
    }
    return json.loads(json.dumps(source)), [source.state() for source in job.sources]


def _is_complete(job: Job, source: dict[str, Any]) -> bool:
    try:
        manifest = load_manifest(job.prefix)
        if manifest is None or {**manifest["source"], "versions": None} != {**source, "versions": None}:
            return False
        return TokenFile(job.prefix).n_tokens == manifest["tokens"] and Path(f"{job.prefix}.sizes").is_file()
    except ConfigError:
        return False


def _open_plan(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Write the plan, or see that the one that is there, if it has finished parts, is the same."""
    path = folder / "plan.json"
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
        except ValueError:
            old = None
        changed = [name for name in plan if not isinstance(old, dict) or old.get(name) != plan[name]]
        if not changed:
            return
        if not overwrite and any(folder.glob("[0-9]*.json")):
            got = f"other {', '.join(changed).replace('state', 'times of change of the inputs')}"
            allowed = "the same inputs and settings, or --overwrite"
            raise ConfigError(f"{folder} holds parts made differently", got, allowed)
    for file in folder.glob("[0-9]*"):
        file.unlink()
    write_whole(path, json.dumps(plan).encode())


def _make(job: Job, source: dict[str, Any], progress: Callable[[Progress], None]) -> None:
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    vocab_size, eos_id = tokenizer.vocab_size(), tokenizer.eos_id()
    tasks = _tasks(job)
    records = {task.number: record for task in tasks if (record := kept_part(job.folder, task.number))}
    manifest = manifest_path(job.prefix)
    for file in (*job.folder.glob("[0-9]*.tmp*"), *manifest.parent.glob(f"{glob.escape(manifest.name)}.*.tmp")):
        file.unlink()
    missing = [task for task in tasks if task.number not in records]
    state = Progress(len(tasks), sum(task.part.weight for task in tasks))
    state.resume(len(records), state.total_weight - sum(task.part.weight for task in missing))
    eos = eos_id if job.append_eod else None
    made = finish_parts(missing, job.folder, job.tokenizer, job.tokenizer_type, eos, job.workers, state, progress)
    records.update(made)
    manifest.unlink(missing_ok=True)
    spools = [(str(job.folder / f"{task.number:08d}"), records[task.number]) for task in tasks]
    joined = join(spools, job.prefix, token_dtype(vocab_size), scratch=str(job.folder / "joined"))
    digest = source["tokenizer"]["sha256"]
    write_manifest(job.prefix, manifest_of(joined, vocab_size, digest, eos_id, job.append_eod, source))


def _tasks(job: Job) -> list[PartTask]:
    pairs = ((source, part) for source in job.sources for part in source.parts(job.part_bytes))
    return [PartTask(number, source, part) for number, (source, part) in enumerate(pairs)]


def kept_part(folder: Path, number: int) -> SpoolRecord | None:
    """The record of a finished part; None if it is missing, damaged, or its files have other hashes."""
    stem = folder / f"{number:08d}"
    try:
        record = SpoolRecord.from_json(json.loads(stem.with_suffix(".json").read_bytes()))
        found = tuple(file_sha256(stem.with_suffix(ending)) for ending in ENDINGS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if found == record.sha256 else None


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is at work in {folder}") from None
        yield


@contextlib.contextmanager
def errors_of_files(prefix: str) -> Iterator[None]:
    """Errors of the system as ConfigError; one that names no file is of those at ``prefix``."""
    try:
        yield
    except OSError as error:
        where = os.fspath(error.filename) if error.filename else f"the files of {prefix}"
        raise ConfigError(f"cannot read or write {where}", error.strerror or error) from None
