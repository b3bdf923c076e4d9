"""Pre-train a LLaMA with a low-rank method: see README.md, or --help."""

import logging
import sys
import warnings

warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", module="torch.jit")
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

from megalowrank.engine.setup import pretrain  # noqa: E402
from megalowrank.errors import run_main  # noqa: E402
from megalowrank.models.build import build_llama  # noqa: E402

if __name__ == "__main__":
    run_main(lambda: pretrain(sys.argv[1:], build_llama, "pretrain_llama.py"))
