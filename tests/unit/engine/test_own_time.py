"""A rank's own time on a CPU: from the count of labels to the last mark before the gradients are reduced."""

import pytest
import torch

from ssa_pretrain.engine import own_time
from ssa_pretrain.engine.interface import PendingStep, StepResult
from ssa_pretrain.engine.own_time import OwnTime

CPU = torch.device("cpu")


def test_window_of_each_step_is_kept_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(own_time.time, "monotonic", lambda: now[0])
    own, readers = OwnTime(), []
    for seconds in (1.0, 2.0):
        own.begin(CPU)
        for _ in range(2):  # the last mark counts
            now[0] += seconds
            own.end(CPU)
        readers.append(own.reader())
    assert [read() for read in readers] == [2.0, 4.0]


def test_step_without_marks_has_no_own_time() -> None:
    def interpret(values: list[float]) -> StepResult:
        return StepResult(values[0], [], [], 0.0, 1.0)

    own = OwnTime()
    assert PendingStep(torch.ones(1), interpret, own.reader()).own_seconds() == 0.0
    assert PendingStep(torch.ones(1), interpret).own_seconds() == 0.0
