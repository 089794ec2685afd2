"""megatron-core on CPU over gloo: the one module that patches anything, installed only when no GPU is used.

megatron-core 0.16 asks for CUDA by name in a few dozen places: `device="cuda"`, `torch.cuda.current_device()`, `Tensor.cuda()`, CUDA's random
states, `Tensor.type()` compared with "torch.cuda.FloatTensor". Here each of them means the CPU. What core computes is unchanged: the redirection
decides where tensors live, never what is done with them. It does not offer CUDA-only features (fused kernels, CUDA graphs, FP8).

How: a `TorchFunctionMode` rewrites the device of tensor-creating calls, `Tensor.cuda` and `Tensor.type`; a handful of `torch.cuda` functions and
core's two random-state helpers are replaced by their CPU counterparts.
"""

import logging
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Every request for a CUDA device in a torch call becomes one for the CPU."""

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
    """A CUDA stream's place-holder: work on a CPU is in order already."""

    def wait_stream(self, _: object) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


def _device() -> torch.device:
    """Return the CPU, where core asks for the current CUDA device."""
    return CPU


def install() -> None:
    """Redirect this process's CUDA requests to the CPU, for good; a second call changes nothing.

    Raises:
        RuntimeError: a GPU is visible; there the redirection would be wrong.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU backend was asked for although a GPU is visible; hide it with CUDA_VISIBLE_DEVICES= or drop the request"
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
    """Give core's tracker of CUDA random states a state of its own, which no CPU operation draws from: it must not move the CPU's.

    Core warns when something draws from the CPU's generator where it expects CUDA's; here every draw does.
    """
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    state = torch.get_rng_state()

    def set_state(new: torch.Tensor, *_: object, **__: object) -> None:
        state.copy_(new)

    random._get_cuda_rng_state = lambda *_, **__: state.clone()
    random._set_cuda_rng_state = set_state
