"""A small task for lm-eval from text of one's own: the last word of a sentence, to be told from others.

    python tools/make_eval_task.py --input text.jsonl --out evaluation

Writes evaluation/last_word.jsonl and evaluation/last_word.yaml. Each question is the beginning of a line; the choices
are its last word and three last words of other lines. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalowrank.data.files import write_whole
from megalowrank.errors import ConfigError, run_main

TASK = """task: last_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: text
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
_CHOICES, _WORDS = 4, range(6, 31)


def beginnings(texts: Iterator[str]) -> list[tuple[str, str]]:
    """(beginning, last word) of every line of 6 to 30 words."""
    lines = (line.strip().rstrip('.,;:!?"').split() for text in texts for line in text.splitlines())
    return [(" ".join(words[:-1]), words[-1]) for words in lines if len(words) in _WORDS and words[-1].isalpha()]


def questions(found: list[tuple[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` questions with choices in random order; ConfigError if the text has too few lines."""
    source, words = random.Random(seed), sorted({word for _, word in found})
    if len(found) < count or len(words) < _CHOICES:
        raise ConfigError("the text has too few lines of 6 to 30 words", len(found), f">= {count}")
    asked = []
    for text, answer in source.sample(found, count):
        others = source.sample([word for word in words if word != answer], _CHOICES - 1)
        choices = source.sample([answer, *others], _CHOICES)
        asked.append({"text": text, "choices": choices, "label": choices.index(answer)})
    return asked


def read_texts(path: Path) -> Iterator[str]:
    """The member ``text`` of every line; ConfigError for a file that has none."""
    try:
        with path.open(encoding="utf-8") as lines:
            yield from (str(json.loads(line)["text"]) for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("--input is not JSON lines with text", f"{path}: {error!r}"[:150]) from None


def main() -> None:
    """Command line of ``make_eval_task``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a member text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the task")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asked = questions(beginnings(read_texts(args.input)), args.questions, args.seed)
    data = (args.out / "last_word.jsonl").absolute()
    write_whole(data, "".join(json.dumps(question) + "\n" for question in asked).encode())
    write_whole(args.out / "last_word.yaml", TASK.format(path=data).encode())
    print(f"{len(asked)} questions in {data}")


if __name__ == "__main__":
    run_main(main)
