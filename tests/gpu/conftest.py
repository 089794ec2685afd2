"""What the tests on GPUs share lies beside them; without a GPU each of them is skipped with the reason."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]


@pytest.fixture(autouse=True, scope="session")
def _gpu_only():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
