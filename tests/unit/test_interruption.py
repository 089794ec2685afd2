"""SIGTERM in a process alone; several ranks are tests/integration/test_leaving.py's."""

import os
import signal
from types import SimpleNamespace

from ssa_pretrain.parallel.interruption import Interruption


def test_one_sigterm_asks_for_the_end_and_more_change_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(SimpleNamespace(world_size=1)) as interruption:  # type: ignore[arg-type]
        assert not interruption.ends(1)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.ends(2)
    assert signal.getsignal(signal.SIGTERM) == before
