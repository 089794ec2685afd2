"""A GPU that torch cannot use ends the run with a message. It does not fall back to the CPU."""

import pytest
import torch

from ssa_pretrain.parallel import state
from ssa_pretrain.settings.problems import ConfigError


def test_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    def broken():
        raise RuntimeError("CUDA driver version is insufficient\nmore")

    monkeypatch.setattr(state, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(ConfigError) as caught:
        state._require_usable(False, 0)
    assert str(caught.value).strip() == (
        "this machine's GPU cannot be used by torch: CUDA driver version is insufficient; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
        "or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    )


def test_more_processes_than_gpus_are_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    state._require_usable(True, 3)
    with pytest.raises(
        ConfigError, match=r"LOCAL_RANK=4 has no GPU: this process sees 4 GPUs; start at most 4 processes"
    ):
        state._require_usable(True, 4)


def test_amd_gpus_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda rank: "AMD Instinct MI300X")
    with pytest.raises(ConfigError) as caught:
        state._require_usable(True, 0)
    assert str(caught.value).strip() == (
        "this machine's GPU, AMD Instinct MI300X, is AMD's: no training run was tested on one, though the operators of ssa_kernels "
        "compile for gfx942 (MI300X); try an NVIDIA GPU, or HIP_VISIBLE_DEVICES= to compute on the CPU"
    )


def test_process_without_a_launcher_uses_the_first_gpu_despite_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert state.launched_local_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert state.launched_local_rank() == 3


def test_machine_without_a_gpu_uses_the_cpu(monkeypatch):
    monkeypatch.setattr(state, "has_gpu", lambda: False)
    state._require_usable(False, 3)
