"""What the tests on GPUs share lies beside them; without a GPU each of them is skipped with the reason."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _gpu_only():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
