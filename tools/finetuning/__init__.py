"""The parts of ``finetune_glue.py``."""

import megalowrank.quiet  # noqa: F401 - first: it sets filters before the libraries are imported
