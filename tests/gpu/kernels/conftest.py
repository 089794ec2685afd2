"""Skips the kernels' GPU tests if there is no GPU, and seeds torch before each."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu_only():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.manual_seed(0)
