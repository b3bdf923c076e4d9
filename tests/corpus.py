"""A tiny corpus made from nothing: words drawn with a fixed seed, a tokenizer trained on them, token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalowrank.data.prepare import prepare
from megalowrank.data.tokenizers import train_tokenizer

VOCABULARY = 320
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "vex", "kings", "and",
    "queens", "of", "far", "northern", "lands",
]  # fmt: skip


@dataclass(frozen=True)
class TinyCorpus:
    """``prefix`` of .bin, .idx and .json; ``tokenizer`` is a sentencepiece model of ``vocab_size`` pieces."""

    prefix: Path
    tokenizer: Path
    vocab_size: int
    tokens: int
    documents: int

    def flags(self) -> list[str]:
        """The command-line flags that name this corpus."""
        return ["--data-path", str(self.prefix), "--tokenizer-model", str(self.tokenizer), "--split", "80,20,0"]


def documents(count: int = 40, lines: int = 40) -> list[str]:
    """Texts whose next word depends on the last one, so that a model can learn something."""
    drawn = np.random.default_rng(5)
    follows = {word: drawn.choice(WORDS, 6) for word in WORDS}
    found = []
    for _ in range(count):
        words = [str(drawn.choice(WORDS))]
        for _ in range(10 * lines):
            words.append(str(drawn.choice(follows[words[-1]])))
        rows = (" ".join(words[10 * line : 10 * line + 10]) for line in range(lines))
        found.append("\n".join(rows) + "\n")
    return found


def make_corpus(folder: Path) -> TinyCorpus:
    """Write the corpus into ``folder``: about 100 kB of text."""
    prefix, tokenizer, texts = folder / "tiny", folder / "tiny.model", documents()
    train_tokenizer(texts, tokenizer, VOCABULARY)
    manifest = prepare(texts, prefix, tokenizer, {"made": "by tests/corpus.py"})
    return TinyCorpus(prefix, tokenizer, VOCABULARY, manifest["tokens"], manifest["documents"])
