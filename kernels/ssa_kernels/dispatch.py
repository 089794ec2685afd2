"""The choice of an operator's implementation: Triton on CUDA tensors, the plain PyTorch reference elsewhere.

It depends only on the caller's `impl` and the tensors' device. There is no silent fallback: a caller that asks for "triton" gets Triton or
an error. CUDA tensors without Triton installed are an error too, because the reference would be slower by orders of magnitude without
anyone noticing. CPU tensors run Triton kernels only under Triton's interpreter (TRITON_INTERPRET=1 in the environment before Triton is
imported), which is how the kernels are tested without a GPU.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeVar

import torch
from torch._C import _len_torch_function_stack
from torch.compiler import is_compiling

from .devices import gpu_of

Impl = Literal["triton", "reference"]
# What stands for each operator while torch.compile traces: a function of the same arguments that calls a custom op. custom_ops/ fills it.
GRAPH_OPERATORS: dict[str, Callable] = {}
P = ParamSpec("P")
R = TypeVar("R")


def past_modes(operator: Callable[P, R]) -> Callable[P, R]:
    """Returns the operator, wrapped so that it bypasses any active torch function mode (megatron-core on a CPU, a default device).

    A reference is many small operations. Each of them, down to reading a shape, would go through the mode's Python first, which takes a
    fifth of the time. Operators name the device of everything that they allocate, so no mode has anything to add.

    While torch.compile traces, the call goes to the operator's custom op (custom_ops/).
    """
    name = operator.__name__

    @wraps(operator)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            return GRAPH_OPERATORS[name](*args, **kwargs)
        if not _len_torch_function_stack():
            return operator(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return operator(*args, **kwargs)

    return called


def dense_gradient(out: torch.Tensor) -> torch.Tensor:
    """Returns `out`, whose incoming gradient is now made contiguous before the reference sees it, as the kernels do.

    Otherwise the order of sums, and with it the last bits, would depend on the gradient's strides.
    """
    if out.requires_grad:
        out.register_hook(lambda grad: grad if grad is None else grad.contiguous())
    return out


def resolve_impl(impl: str | None, tensor: torch.Tensor, operator: str) -> Impl:
    """Returns "triton" or "reference" for an operator whose inputs are on `tensor`'s device.

    Args:
        impl: the caller's choice; None chooses by device.
        tensor: any of the operator's inputs.
        operator: the operator's name, for messages.

    Raises:
        ValueError: for an unknown name, and if Triton is asked for (or needed on CUDA) but cannot run here or in the tensor's dtype.
    """
    if impl not in (None, "triton", "reference"):
        raise ValueError(f"impl={impl!r} of {operator} must be None, 'triton' or 'reference'; try None")
    if impl == "reference" or (impl is None and not tensor.is_cuda):
        return "reference"
    if find_spec("triton") is None:
        raise ValueError(
            f"impl={impl!r} of {operator} on {tensor.device} needs Triton, which is not installed; "
            "try pip install triton, or impl='reference'"
        )
    if not tensor.is_cuda and not _interpreting():
        raise ValueError(
            f"impl='triton' of {operator} needs CUDA tensors, got {tensor.device}; "
            "try impl='reference', or TRITON_INTERPRET=1 in the environment for a test"
        )
    _check_dtype(tensor, operator)
    if (gpu := gpu_of(tensor.device)).backend == "cuda" and gpu.capability < 80:
        raise ValueError(
            f"tensors of {operator} are on a {torch.cuda.get_device_name(tensor.device)} of compute capability {gpu.capability / 10:.1f}, "
            "but the kernels need 8.0 (A100) or later; try impl='reference'"
        )
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        raise ValueError(
            f"tensors of {operator} on {tensor.device} must be on the current device cuda:{torch.cuda.current_device()}, where kernels "
            f"are launched; try torch.cuda.set_device({tensor.device.index})"
        )
    return "triton"


def _check_dtype(tensor: torch.Tensor, operator: str) -> None:
    """Raises ValueError for dtypes that only the reference supports."""
    if tensor.dtype == torch.float64:
        raise ValueError(
            f"{operator}'s kernels compute in float32, so they do not take float64; try impl='reference', or float32"
        )
    if tensor.dtype == torch.bfloat16 and tensor.is_cpu:
        raise ValueError(
            f"impl='triton' of {operator} on a CPU is Triton's interpreter, whose bfloat16 is wrong; try float32 or float16, or impl='reference'"
        )


def _interpreting() -> bool:
    """Returns whether Triton's interpreter is on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
