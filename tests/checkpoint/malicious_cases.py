"""Files that run a command when they are unpickled, and where they are put."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoint.io_cases import rewrite_manifest
from tests.corpus import TinyCorpus


class Bomb:
    """Unpickling it makes the folder ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def payloads(marker: Path) -> dict[str, bytes]:
    """The bomb as plain pickle, as text, and as torch.save writes it today and wrote it once."""
    found = {"pickle": pickle.dumps({"w": Bomb(marker)}), "text": pickle.dumps({"w": Bomb(marker)}, protocol=0)}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"w": Bomb(marker)}, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    return found


def plant_in_checkpoint(saved: Path, to: Path, file: str, payload: bytes) -> Path:
    """A copy of a folder of checkpoints in which the newest has the payload as ``file``, its hashes right."""
    shutil.copytree(saved, to)
    folder = to / (to / "latest").read_text().strip()
    target = to / file if file in ("latest", "metrics.jsonl", "run.json") else folder / file
    target.write_bytes(payload)
    if file.startswith("rank_"):
        digest = hashlib.sha256(payload).hexdigest()
        rewrite_manifest(folder, lambda it: it["files"][0].update(bytes=len(payload), sha256=digest))
    if file == "manifest.json":
        (folder / "manifest.sha256").write_text(f"{hashlib.sha256(payload).hexdigest()}  manifest.json\n")
    return to


def plant_in_data(corpus: TinyCorpus, to: Path, ending: str, payload: bytes) -> list[str]:
    """Flags of a copy of the corpus in which one file is the payload and everything that names its hash agrees."""
    to.mkdir()
    for path in corpus.prefix.parent.glob("tiny.*"):
        shutil.copy(path, to)
    target = to / f"tiny{ending}"
    if ending == ".bin":  # of the size that the index says
        payload = (payload * (target.stat().st_size // len(payload) + 1))[: target.stat().st_size]
    target.write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    named = {".bin": "bin_sha256", ".sizes": "sizes_sha256", ".model": "tokenizer_sha256"}
    if ending in named:
        manifest = json.loads((to / "tiny.json").read_text())
        (to / "tiny.json").write_text(json.dumps({**manifest, named[ending]: digest}))
    return ["--data-path", str(to / "tiny"), "--tokenizer-model", str(to / "tiny.model"), "--split", "80,20,0"]


def plant_in_tokenizer(to: Path, payload: bytes) -> Path:
    """A Hugging Face folder all of whose files are the payload, and one that asks for code of its own."""
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "special_tokens_map.json", "pytorch_model.bin"):
        (to / name).write_bytes(payload)
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (to / "tokenizer_config.json").write_text(json.dumps(code))
    (to / "mine.py").write_text("raise SystemExit('code of the tokenizer ran')\n")
    return to
