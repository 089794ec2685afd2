"""Page-locked memory: tensors share blocks without touching each other, blocks are freed with their owner, and a refusal names the setting."""

import mmap

import pytest
import torch

from ssa_pretrain.checkpoint import locked_memory
from ssa_pretrain.checkpoint.locked_memory import LockedMemory
from ssa_pretrain.errors import CheckpointError


@pytest.fixture
def calls(monkeypatch):
    """The calls that lock and free, which need a GPU, and small blocks."""
    found = []
    monkeypatch.setattr(locked_memory, "pin_memory", lambda *place: found.append(("lock", *place)))
    monkeypatch.setattr(locked_memory, "unpin_memory", lambda *place: found.append(("free", *place)))
    monkeypatch.setattr(locked_memory, "BLOCK", 2**16)
    return found


def test_tensors_share_blocks_that_are_freed_with_the_owner(calls):
    kinds = [((3,), torch.bfloat16), ((), torch.float32), ((63, 63), torch.float32), ((0, 4), torch.float32)]
    kinds += [((2**16,), torch.uint8), ((99, 99), torch.bfloat16), *[((61, 61), torch.float32)] * 4]
    memory, taken = LockedMemory(), []
    for number, (shape, dtype) in enumerate(kinds):
        live = torch.full(shape, number, dtype=dtype)
        taken.append((live, memory.like(live).copy_(live)))
    for live, copied in taken:
        assert copied.dtype == live.dtype and copied.is_contiguous() and torch.equal(copied, live)
    places = [place for kind, place, _ in calls if kind == "lock"]
    assert [size for _, _, size in calls] == [2**16, 2**16, 19712, 2**16]  # shared; two large tensors' own; shared
    assert all(place % mmap.PAGESIZE == 0 for place in places)
    del taken, copied, memory
    assert sorted(place for kind, place, *_ in calls if kind == "free") == sorted(places)


def test_saved_file_has_the_tensors_of_several_types_and_no_others(calls, tmp_path):
    """Tensors that shared a storage could not be saved with two types, and each file would hold the whole block."""
    memory = LockedMemory()
    memory.like(torch.empty(2**13))
    saved = {
        str(dtype): memory.like(torch.empty(50, dtype=dtype)).fill_(7) for dtype in (torch.bfloat16, torch.float32)
    }
    assert len([kind for kind, *_ in calls if kind == "lock"]) == 2  # the large tensor's, and the one that both share
    torch.save(saved, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert (tmp_path / "state.pt").stat().st_size < 2**12


def test_memory_that_cannot_be_locked_is_reported_with_the_setting(monkeypatch):
    def refuse(*_: int) -> None:
        raise RuntimeError("cudaError: 2")

    monkeypatch.setattr(locked_memory, "pin_memory", refuse)
    with pytest.raises(CheckpointError) as caught:
        LockedMemory().like(torch.zeros(2**10))
    assert str(caught.value) == (
        "0.2 GiB of host memory cannot be page-locked for a copy of the training state (cudaError: 2); set checkpoint.asynchronous=false"
    )
