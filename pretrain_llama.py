"""Pre-train a LLaMA with a low-rank method: see README.md, or --help."""

import sys

from megalowrank.signals import listen

if __name__ == "__main__":
    listen()

import megalowrank.quiet  # noqa: F401 - it sets filters before the libraries are imported
from megalowrank.engine.setup import pretrain
from megalowrank.errors import run_main
from megalowrank.models.build import build_llama

if __name__ == "__main__":
    run_main(lambda: pretrain(sys.argv[1:], build_llama, "pretrain_llama.py"))
