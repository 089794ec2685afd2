"""Settings of the process that tests: Triton's interpreter where there is no GPU, no package called `kernels`, faster composition, and when garbage is
collected.
"""

import gc
import os
import sys

import torch

from support import composing

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported
# pytest's path holds tests/, whose folder kernels/ would pass for Hugging Face's package: Transformers looks for it and fails on a missing version.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # find_spec returns None
composing.make_faster()


def pytest_collection_finish() -> None:
    """Exempts what has been imported from garbage collection, which otherwise takes an eighth of the time of tests in this process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
