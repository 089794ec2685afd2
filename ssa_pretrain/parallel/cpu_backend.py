"""Runs megatron-core on a CPU over gloo. The only module that patches other libraries, and only if no GPU is used.

megatron-core 0.16 names CUDA in a few dozen places: `device="cuda"`, `torch.cuda.current_device()`, `Tensor.cuda()`, CUDA's random states,
`Tensor.type()` compared with "torch.cuda.FloatTensor". Here each of them means the CPU. The redirection decides where tensors live and does not
change what core computes. CUDA-only features (fused kernels, CUDA graphs, FP8) are not available.

A `TorchFunctionMode` rewrites the device of tensor-creating calls, `Tensor.cuda` and `Tensor.type`. A few `torch.cuda` functions and core's two
random-state helpers are replaced by their CPU counterparts.
"""

import logging
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA devices in torch calls by the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A placeholder for a CUDA stream: work on a CPU is already in order."""

    def wait_stream(self, _: object) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""


def _device() -> torch.device:
    """Returns the CPU where core asks for the current CUDA device."""
    return CPU


def install() -> None:
    """Redirects this process's CUDA requests to the CPU permanently; a second call does nothing.

    Raises:
        RuntimeError: a GPU is visible, and the redirection would be wrong.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU backend was requested although a GPU is visible; hide it with CUDA_VISIBLE_DEVICES= or drop the request"
        )
    if torch.cuda.current_device is _device:
        return
    _CudaMeansCpu().__enter__()
    torch.cuda.current_device = _device
    torch.cuda.current_stream = lambda *_: _Stream()
    torch.cuda.stream = lambda *_: nullcontext()
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = lambda _: None
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _redirect_random_states()


def _redirect_random_states() -> None:
    """Gives core's tracker of CUDA random states a separate state that no CPU operation draws from: it must not change the CPU's generator.

    Core warns if something draws from the CPU's generator where it expects CUDA's; here every draw does, so the warning is off.
    """
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    state = torch.get_rng_state()

    def set_state(new: torch.Tensor, *_: object, **__: object) -> None:
        state.copy_(new)

    random._get_cuda_rng_state = lambda *_, **__: state.clone()
    random._set_cuda_rng_state = set_state
