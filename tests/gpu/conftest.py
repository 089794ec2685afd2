"""Skips every test in this folder if there is no GPU."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _gpu_only():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
