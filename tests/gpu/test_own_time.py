"""A rank's own time on a GPU: between two events of the stream, without the waits before and after, and read without waiting."""

import time

import pytest
import torch

from ssa_pretrain.engine.own_time import OwnTime

pytestmark = pytest.mark.gpu
CYCLES = 200_000_000  # about 0.1 s


def test_events_measure_the_window_only_and_recording_does_not_wait() -> None:
    device, own = torch.device("cuda", torch.cuda.current_device()), OwnTime()
    torch.cuda._sleep(CYCLES)
    torch.cuda.synchronize()
    begin = time.monotonic()
    torch.cuda._sleep(3 * CYCLES)
    own.begin(device)
    torch.cuda._sleep(CYCLES)
    own.end(device)
    torch.cuda._sleep(3 * CYCLES)
    read = own.reader()
    queued = time.monotonic() - begin
    torch.cuda.synchronize()
    whole = time.monotonic() - begin
    assert queued < whole / 2
    assert read() == pytest.approx(whole / 7, rel=0.2)
