"""Preprocessing: the result against a plain loop, whatever the workers, parts and kills; damage; bad inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megalowrank.data.manifest import load_manifest
from megalowrank.data.parts import Progress
from megalowrank.data.preprocess import Job, preprocess
from megalowrank.data.sources import JsonLines, file_sources
from megalowrank.data.tokenizers import load_tokenizer
from megalowrank.data.tokens import TokenFile
from megalowrank.errors import ConfigError, TrainingError
from tests.corpus import TinyCorpus, documents
from tests.data.preprocess_cases import SlowLines
from tests.harness import ROOT

PART = 4_000
RESULTS = (".bin", ".idx", ".sizes", ".json")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*documents(24, 20), "", "ünï 東京", "last"]


@pytest.fixture(scope="module")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def job(text_file: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> Job:
    return Job([JsonLines(text_file)], str(tmp_path / "out" / "x"), str(tiny_corpus.tokenizer), part_bytes=PART)


@pytest.fixture(scope="module")
def expected(text_file: str, tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the results of one undisturbed run, by the kind of its source."""
    folder = tmp_path_factory.mktemp("expected")
    found = {}
    for kind in (JsonLines, SlowLines):
        prefix = str(folder / kind.__name__)
        preprocess(Job([kind(text_file)], prefix, str(tiny_corpus.tokenizer), part_bytes=PART))
        found[kind.__name__] = hashes(prefix)
    return found


def hashes(prefix: str) -> str:
    return " ".join(hashlib.sha256(Path(prefix + ending).read_bytes()).hexdigest() for ending in RESULTS)


def leftovers(prefix: str) -> list[str]:
    names = {Path(prefix + ending).name for ending in RESULTS}
    return sorted(path.name for path in Path(prefix).parent.iterdir() if path.name not in names)


def test_megatron_reads_the_tokens_of_a_plain_loop(job: Job, texts: list[str]) -> None:
    assert preprocess(job)
    tokenizer, kept = load_tokenizer(job.tokenizer), [text for text in texts if text]
    dataset = IndexedDataset(job.prefix)
    assert len(dataset) == len(kept) and dataset.document_indices.tolist() == list(range(len(kept) + 1))
    for number, text in enumerate(kept):
        assert dataset[number].tolist() == [*tokenizer.encode(text), tokenizer.eos_id()]
    manifest = load_manifest(job.prefix) or {}
    assert (manifest["documents"], manifest["bytes"]) == (len(kept), sum(len(text.encode()) for text in kept))
    sizes = np.diff(np.fromfile(f"{job.prefix}.sizes", "<i8")).tolist()
    assert sizes == [len(text.encode()) for text in kept]
    [found] = manifest["source"]["inputs"]
    assert (found["kind"], found["bytes"]) == ("JsonLines", os.path.getsize(found["path"]))
    assert manifest["tokenizer_sha256"] == hashlib.sha256(Path(job.tokenizer).read_bytes()).hexdigest()
    assert leftovers(job.prefix) == []


def test_without_eos(job: Job, texts: list[str]) -> None:
    preprocess(replace(job, append_eod=False))
    tokenizer, dataset = load_tokenizer(job.tokenizer), IndexedDataset(job.prefix)
    assert dataset[0].tolist() == tokenizer.encode(texts[0])
    assert (load_manifest(job.prefix) or {})["append_eod"] is False


def test_tokens_do_not_depend_on_parts_or_workers(job: Job, expected: dict[str, str], tmp_path: Path) -> None:
    preprocess(replace(job, workers=3))
    assert hashes(job.prefix) == expected["JsonLines"]
    other = replace(job, prefix=str(tmp_path / "y"), part_bytes=1000)
    preprocess(other)
    for ending in RESULTS[:3]:
        assert Path(other.prefix + ending).read_bytes() == Path(job.prefix + ending).read_bytes()


def test_a_second_run_does_nothing_and_other_settings_need_to_be_wanted(job: Job) -> None:
    assert preprocess(job)
    changed = os.stat(f"{job.prefix}.bin").st_mtime_ns
    assert not preprocess(job) and os.stat(f"{job.prefix}.bin").st_mtime_ns == changed
    other = replace(job, append_eod=False)
    with pytest.raises(ConfigError, match="made from something else.*--overwrite"):
        preprocess(other)
    assert preprocess(other, overwrite=True) and not preprocess(other)
    os.remove(f"{job.prefix}.idx")
    assert preprocess(other, overwrite=True)


def start(job: Job, folder: Path, **case: object) -> subprocess.Popen:
    source = job.sources[0]
    assert isinstance(source, JsonLines)
    case = {"input": source.path, "prefix": job.prefix, "tokenizer": job.tokenizer, "part_bytes": PART, **case}
    (folder / "case.json").write_text(json.dumps(case))
    command = [sys.executable, "-m", "tests.data.preprocess_cases", str(folder / "case.json")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def finished(job: Job) -> dict[str, int]:
    """Time of change of the records of finished parts."""
    return {path.name: path.stat().st_mtime_ns for path in job.folder.glob("[0-9]*.json")}


@pytest.mark.parametrize("workers, parts", [(1, 1), (2, 3), (2, 5), (2, 0)])
def test_killed_between_parts_and_continued(
    job: Job, tmp_path: Path, expected: dict[str, str], workers: int, parts: int
) -> None:
    assert start(job, tmp_path, workers=workers, kill_after=parts).wait(120) == -9
    kept = finished(job)
    assert len(kept) >= parts and not Path(f"{job.prefix}.idx").exists()
    seen: list[Progress] = []
    job = replace(job, sources=[SlowLines(job.sources[0].path)], workers=3 - workers)
    preprocess(job, lambda state: seen.append(replace(state)))
    assert hashes(job.prefix) == expected["SlowLines"] and leftovers(job.prefix) == []
    assert seen[0].total_parts > 5 and seen[0].parts >= len(kept)
    assert seen[-1].parts == seen[0].total_parts and (seen[0].kept_weight > 0) >= (len(kept) > 0)


@pytest.mark.parametrize("move", [1, 2, 3, 4, 5, 6])
def test_killed_while_results_are_moved_into_place(
    job: Job, tmp_path: Path, expected: dict[str, str], move: int
) -> None:
    assert start(job, tmp_path, workers=1, kill_move=move).wait(120) == -9
    assert (load_manifest(job.prefix) is not None) == (move == 6)
    assert not Path(f"{job.prefix}.idx").exists() or move >= 5
    kept = finished(job)
    assert bool(kept) == (move > 1)
    assert preprocess(replace(job, sources=[SlowLines(job.sources[0].path)])) == (move < 6)
    assert hashes(job.prefix) == expected["SlowLines"] and leftovers(job.prefix) == []


def test_killed_within_a_part_the_workers_end_and_their_work_goes_on(
    job: Job, tmp_path: Path, expected: dict[str, str]
) -> None:
    slow = start(job, tmp_path, workers=2, pause=0.2)
    deadline = time.monotonic() + 60
    while not (finished(job) and list(job.folder.glob("[0-9]*.tmp*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert finished(job) and not Path(f"{job.prefix}.idx").exists()
    children = Path(f"/proc/{slow.pid}/task/{slow.pid}/children").read_text().split()
    slow.kill()
    slow.wait(30)
    while any(alive(int(child)) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(int(child)) for child in children)
    original = replace(job, sources=[SlowLines(job.sources[0].path, pause=0.2)], workers=2)
    with pytest.raises(ConfigError, match="parts made differently"):
        preprocess(replace(original, part_bytes=PART + 1))
    (job.folder / "plan.json").write_text(
        (job.folder / "plan.json").read_text().replace('"pause": 0.2', '"pause": 0.0')
    )
    preprocess(replace(original, sources=[SlowLines(job.sources[0].path)]))
    assert hashes(job.prefix) == expected["SlowLines"] and leftovers(job.prefix) == []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def interrupted(job: Job, after: int) -> None:
    """A run that ends, as by ctrl-C, after some parts."""

    def progress(state: Progress) -> None:
        if state.parts >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(job, progress)


@pytest.mark.parametrize("ending", [".bin", ".len", ".size", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_part_is_made_anew_and_the_others_kept(
    job: Job, expected: dict[str, str], ending: str, damage: str
) -> None:
    interrupted(job, 3)
    path = job.folder / f"00000001{ending}"
    content = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    kept: list[int] = []
    preprocess(job, lambda state: kept.append(state.parts))
    assert kept[0] >= 2
    assert hashes(job.prefix) == expected["JsonLines"]


def test_inputs_that_change_in_between_are_noticed(job: Job, tmp_path: Path) -> None:
    copy = shutil.copy(job.sources[0].path, tmp_path / "copy.jsonl")
    job = replace(job, sources=[JsonLines(str(copy))])
    interrupted(job, 1)
    os.utime(copy, (1, 1))
    with pytest.raises(ConfigError, match="times of change of the inputs"):
        preprocess(job)
    assert preprocess(job, overwrite=True)


def test_two_runs_at_once_are_refused(job: Job, tmp_path: Path) -> None:
    slow = start(job, tmp_path, workers=1, pause=0.5)
    try:
        deadline = time.monotonic() + 60
        while not (job.folder / "plan.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(ConfigError, match="another process is at work"):
            preprocess(job)
    finally:
        slow.kill()
        slow.wait(30)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_ends_all_and_leaves_no_result(job: Job, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(Path(job.sources[0].path).read_text() + '{"text": 5}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line at byte \d+, has no text"):
        preprocess(replace(job, sources=[JsonLines(str(path))], workers=workers))
    assert leftovers(job.prefix) == ["x.parts"] and not Path(f"{job.prefix}.bin").exists()


def test_a_worker_that_dies_stops_the_run(job: Job) -> None:
    def progress(state: Progress) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        spawned = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        for child in spawned:
            os.kill(child, 9)

    slow = replace(job, sources=[SlowLines(job.sources[0].path, pause=0.3)])
    with pytest.raises(TrainingError, match="worker process died"):
        preprocess(slow, progress)


def test_memory_does_not_grow_with_the_number_of_documents(job: Job, tmp_path: Path) -> None:
    """Four times the documents, each of 5 bytes: even 20 bytes for each would be 2.4 MB more.

    Blocks are made small, so that those of the smaller run are full, too.
    """
    peaks = []
    for count in (40_000, 160_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text('{"text": "a fox"}\n' * count)
        case = {"input": str(path), "prefix": str(tmp_path / str(count)), "part_bytes": 300_000}
        case |= {"workers": 1, "block": 1 << 13}
        peaks.append(json.loads(start(job, tmp_path, **case).communicate(timeout=240)[0]))
        assert TokenFile(str(tmp_path / str(count))).n_documents == count
    assert max(large - small for small, large in zip(*peaks, strict=True)) < 1_900


def test_nothing_to_write_and_no_workers(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(ConfigError, match="no tokens"):
        preprocess(replace(job, sources=file_sources(tmp_path / "empty.jsonl", "text", "document"), append_eod=False))
    with pytest.raises(ConfigError, match="--workers"):
        preprocess(replace(job, workers=0))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot read or write"):
        preprocess(replace(job, prefix=str(tmp_path / "file" / "x")))
