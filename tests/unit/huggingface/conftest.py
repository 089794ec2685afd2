"""A world of one process for the tests of this folder."""

import pytest

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.parallel.state import joined


@pytest.fixture(scope="module")
def placement():
    """Yields this process's placement."""
    with joined(ParallelConfig(), seed=1) as found:
        yield found
