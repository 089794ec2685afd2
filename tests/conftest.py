"""Settings that must precede imports: Triton's interpreter where there is no GPU, and no package called `kernels`."""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported
# pytest's path holds tests/, whose folder kernels/ would pass for Hugging Face's package: Transformers looks for it and fails on a missing version.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # find_spec returns None
