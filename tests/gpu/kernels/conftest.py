"""Skips the kernels' GPU tests without a GPU, and makes the oracle of tests/kernels importable."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu_only():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.manual_seed(0)
