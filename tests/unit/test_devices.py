"""A machine whose GPU torch cannot use: the run ends with a sentence, and does not compute on the CPU."""

import pytest
import torch

from ssa_pretrain.parallel import state
from ssa_pretrain.settings.problems import ConfigError


def test_a_gpu_that_torch_cannot_use_is_no_cpu(monkeypatch):
    def broken():
        raise RuntimeError("CUDA driver version is insufficient\nmore")

    monkeypatch.setattr(state, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(ConfigError) as caught:
        state._require_usable(False, 0)
    assert str(caught.value).strip() == (
        "this machine's GPU cannot be used by torch: CUDA driver version is insufficient; look at nvidia-smi and CUDA_VISIBLE_DEVICES, "
        "or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    )


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    state._require_usable(True, 3)
    with pytest.raises(
        ConfigError, match=r"LOCAL_RANK=4 finds 4 GPUs that this process may see; start at most 4 processes"
    ):
        state._require_usable(True, 4)


def test_a_process_without_a_launcher_takes_the_first_gpu_whatever_its_surroundings_hold(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert state.launched_local_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert state.launched_local_rank() == 3


def test_a_machine_without_a_gpu_is_a_cpu(monkeypatch):
    monkeypatch.setattr(state, "has_gpu", lambda: False)
    state._require_usable(False, 3)
