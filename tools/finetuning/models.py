"""The models to compare: their names, and a folder of each that transformers loads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalowrank.checkpoint.folder import sha256
from megalowrank.checkpoint.hf.convert import Export, to_hf
from megalowrank.checkpoint.hf.folder import safetensors_files
from megalowrank.checkpoint.hf.tokenizer import FILES
from megalowrank.checkpoint.io import Checkpoint
from megalowrank.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megalowrank.errors import ConfigError
from megalowrank.parallel.groups import initialize_single_process

_CONFIG = "config.json"
_GENERIC = ("checkpoints", "checkpoint")


@dataclass(frozen=True)
class Candidate:
    """A model to fine-tune: a Hugging Face folder, or a checkpoint of megalowrank."""

    name: str
    path: Path

    @property
    def is_foreign(self) -> bool:
        """Whether transformers can load it as it is."""
        return (self.path / _CONFIG).is_file()

    def fingerprint(self) -> str:
        """SHA-256 of its weights, by the files that hold them; ConfigError if there are none."""
        if self.is_foreign:
            files = safetensors_files(self.path, "model")
        else:
            files = [Checkpoint.open(self.path, verify=False).path / "manifest.json"]
        return " ".join(sha256(file) for file in files)


def candidates(given: Sequence[str]) -> list[Candidate]:
    """Models by PATH or NAME=PATH; without a name it is that of the folder (the run's, of ``run/checkpoints``).

    Raises ConfigError if a folder is not there or two have one name.
    """
    found: dict[str, Candidate] = {}
    for text in given:
        name, equals, path = text.partition("=")
        folder = Path(path if equals else text)
        if not folder.is_dir():
            raise ConfigError("no such folder of a model", text, "a Hugging Face folder, a checkpoint or a run")
        name = name if equals else _name_of(folder)
        if not name or "/" in name or name in found:
            raise ConfigError("a model needs a name of its own", name or text, "NAME=PATH")
        found[name] = Candidate(name, _model_in(folder.absolute()))
    return list(found.values())


def _model_in(folder: Path) -> Path:
    """The folder itself, unless it is that of a run whose checkpoints lie below."""
    below = folder / _GENERIC[0]
    own = any((folder / name).exists() for name in (_CONFIG, "latest", "manifest.json"))
    return below if below.is_dir() and not own else folder


def _name_of(folder: Path) -> str:
    path = folder.absolute()
    while path.name in _GENERIC or path.name.startswith("step_"):
        path = path.parent
    return path.name


def load_ready(candidate: Candidate, temporary: Path, report: Callable[[str], None]) -> Path:
    """The folder of a model for transformers; one of ours is written into ``temporary``, factors merged.

    Raises ConfigError for what cannot be exported.
    """
    if candidate.is_foreign:
        return candidate.path
    out = temporary / candidate.name
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            initialize_single_process(str(Path(folder) / "store"))
            to_hf(candidate.path, out, Export(), lambda line: report(f"{candidate.name}: {line}"))
    return out


def tokenizer_of(folder: Path, name: str) -> HuggingFaceTokenizer:
    """The tokenizer in a folder of ``load_ready``; ConfigError if there is none."""
    if not any(path for pattern in FILES for path in folder.glob(pattern)):
        raise ConfigError(f"{name} has no tokenizer", None, "a model with its tokenizer's files")
    found = load_tokenizer(folder)
    assert isinstance(found, HuggingFaceTokenizer)
    return found
