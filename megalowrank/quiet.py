"""Import this first in a program: it silences what the libraries say about themselves.

megatron-core, DeepSpeed and torch print dozens of lines on import about optional packages and coming
deprecations, which a user can do nothing about. Their errors stay.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch

for module in ("megatron", "deepspeed", "torch"):
    warnings.filterwarnings("ignore", module=module)
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
