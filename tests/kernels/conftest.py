"""Keeps every test of this folder on one core, and Triton's interpreter from work that it repeats."""

import pytest
import torch

from support.interpreter import make_faster

make_faster()


@pytest.fixture(autouse=True)
def _one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
