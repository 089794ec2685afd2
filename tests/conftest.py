"""Without a GPU, Triton's kernels run in its interpreter. It has to be asked for before Triton is first imported, so here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
