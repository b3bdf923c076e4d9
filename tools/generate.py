"""Sample text from a checkpoint of a run: any model family, any method, on one device.

    python tools/generate.py runs/quickstart/checkpoints --prompt "ROMEO:" --max-new-tokens 100

Low-rank factors are merged into W first. There is no cache of keys: every token is one forward pass over the window,
which is enough to look at what a model has learned. Serving is for the converted model.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("megalowrank") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
from megalowrank.checkpoint.plain import load_plain
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.data.tokenizers import Tokenizer, load_tokenizer
from megalowrank.errors import ConfigError, run_main
from megalowrank.models.build import BuiltModel
from megalowrank.parallel.groups import initialize_single_process


def load_model(saved: SavedWeights, device: torch.device) -> BuiltModel:
    """The model of a checkpoint with everything merged, float32, in evaluation mode; ConfigError if it is damaged.

    A process group of one has to exist.
    """
    if saved.model_config().num_labels is not None:
        raise ConfigError(f"{saved.checkpoint.path.name} is of a labelled task and continues no text")
    model = load_plain(saved)
    model.module.to(device)
    return model


def choose(
    logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, source: torch.Generator
) -> torch.Tensor:
    """One token id: the likeliest at temperature 0, else drawn among the ``top_k`` (0: all) and the ``top_p`` mass."""
    if temperature == 0.0:
        return logits_V.argmax()
    scaled_V = logits_V.float() / temperature
    values, order = scaled_V.sort(descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    values = values.masked_fill(before >= top_p, -math.inf)
    if top_k:
        values[top_k:] = -math.inf
    place = torch.multinomial(values.softmax(-1).cpu(), 1, generator=source)[0]
    return order[place]


@torch.no_grad()
def continue_text(
    model: BuiltModel, tokenizer: Tokenizer, prompt: str, length: int, args: argparse.Namespace, source: torch.Generator
) -> str:
    """``prompt`` with up to ``max_new_tokens`` tokens after it, fewer if the model ends the document."""
    device = model.tensors[0].parameter.device
    tokens = tokenizer.encode(prompt) or [max(tokenizer.eos_id(), 0)]
    new: list[int] = []
    for _ in range(args.max_new_tokens):
        window = torch.tensor([(tokens + new)[-length:]], device=device)
        token = int(choose(model.module.logits(window)[-1, 0], args.temperature, args.top_k, args.top_p, source))
        if token == tokenizer.eos_id():
            break
        new.append(token)
    return tokenizer.decode((tokens if tokenizer.encode(prompt) else []) + new)


def check(args: argparse.Namespace) -> None:
    """Ranges of single values."""
    for name, value, allowed, fine in (
        ("max-new-tokens", args.max_new_tokens, ">= 1", args.max_new_tokens >= 1),
        ("temperature", args.temperature, ">= 0, finite", 0.0 <= args.temperature < math.inf),
        ("top-k", args.top_k, ">= 0", args.top_k >= 0),
        ("top-p", args.top_p, "0 < p <= 1", 0.0 < args.top_p <= 1.0),
        ("num-samples", args.num_samples, ">= 1", args.num_samples >= 1),
        ("seed", args.seed, "0 <= seed < 2^63", 0 <= args.seed < 2**63),
    ):
        if not fine:
            raise ConfigError(f"--{name} is out of range", value, allowed)


def device_of(name: str) -> torch.device:
    """The device that is named; ConfigError if it is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0][:100]
        raise ConfigError("--device cannot be used", f"{name}: {reason}", "cpu, or cuda with a GPU") from None


def tokenizer_of(saved: SavedWeights, given: str | None) -> Tokenizer:
    """The tokenizer that is named, else the one the run was trained with; ConfigError if neither is there."""
    path = given or saved.run["data"].get("tokenizer_model")
    if path is None:
        raise ConfigError("the run does not name its tokenizer", None, "--tokenizer-model")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size() > int(saved.run["model"]["vocab_size"]):
        raise ConfigError(f"the tokenizer {path} has more tokens than the model", tokenizer.vocab_size())
    return tokenizer


def main() -> None:
    """Command line of ``generate``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of checkpoints (the newest is taken), or one checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among this many tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this mass")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-model", help="default: the one of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check(args)
    device = device_of(args.device)
    saved = SavedWeights.open(args.checkpoint)
    tokenizer = tokenizer_of(saved, args.tokenizer_model)
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))
        model = load_model(saved, device)
    source = torch.Generator().manual_seed(args.seed)
    length = int(saved.run["train"]["seq_length"])
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {number + 1}")
        print(continue_text(model, tokenizer, args.prompt, length, args, source), flush=True)


if __name__ == "__main__":
    run_main(main)
