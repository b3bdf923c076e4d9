"""megalowrank: low-rank pre-training of language models, sharded."""

__version__ = "0.6.0"
