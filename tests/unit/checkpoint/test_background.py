"""A save on a thread: its result, and its failure, reach the main thread."""

import threading

import pytest
import torch.distributed as dist

from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.errors import CheckpointError


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_result_is_there_once_the_thread_is_done():
    go = threading.Event()
    save = BackgroundSave(3, lambda: go.wait() and threading.current_thread().name)
    assert save.poll(4) is None
    go.set()
    assert save.wait() == "save 3"
    assert save.poll(5) == "save 3"


@pytest.mark.parametrize("error", [CheckpointError("step 3 could not be saved"), ZeroDivisionError("a bug")])
def test_failure_is_raised_at_the_next_step(error):
    def act() -> None:
        raise error

    save = BackgroundSave(3, act)
    with pytest.raises(type(error), match=str(error)):
        save.wait()
    with pytest.raises(type(error), match=str(error)):
        save.poll(4)
