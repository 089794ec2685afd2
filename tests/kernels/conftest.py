"""Makes this folder's oracle importable for the tests beside it, and runs every test on one core."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
