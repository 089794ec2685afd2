"""Which implementation runs an operator: Triton on CUDA tensors, the plain PyTorch reference elsewhere.

The rule is only about what was asked for and where the tensors lie. Nothing falls back in silence: a caller who asks for
"triton" gets Triton or an error, and CUDA tensors without Triton installed are an error as well, because the reference would
be slower by orders of magnitude without anyone noticing. CPU tensors run Triton kernels only under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before Triton is imported), which is how the kernels are tested without a GPU.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeVar

import torch
from torch._C import _len_torch_function_stack

Impl = Literal["triton", "reference"]
P = ParamSpec("P")
R = TypeVar("R")


def past_modes(operator: Callable[P, R]) -> Callable[P, R]:
    """Returns the operator as it runs where a torch function mode is active (megatron-core on a CPU, a default device): past that mode.

    A reference is many small operations, and each of them, down to the reading of a shape, would go through the mode's Python first, which
    takes a fifth of the time. Operators name the device of whatever they make, so no mode has anything to add.
    """

    @wraps(operator)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _len_torch_function_stack():
            return operator(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return operator(*args, **kwargs)

    return called


def dense_gradient(out: torch.Tensor) -> torch.Tensor:
    """Returns a reference's result, whose gradient the reference will get contiguous, as the kernels do.

    Else the order of sums, and with it the last bits, would depend on the strides of what comes in.
    """
    if out.requires_grad:
        out.register_hook(lambda grad: grad if grad is None else grad.contiguous())
    return out


def resolve_impl(impl: str | None, tensor: torch.Tensor, operator: str) -> Impl:
    """Returns "triton" or "reference" for an operator whose inputs lie where `tensor` does.

    Args:
        impl: what the caller asked for; None picks by device.
        tensor: any of the operator's inputs.
        operator: the operator's name, for messages.

    Raises:
        ValueError: an unknown name, or Triton asked for (or needed on CUDA) where it cannot run or not in the tensor's dtype.
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
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        raise ValueError(
            f"tensors of {operator} on {tensor.device} must be on the current device cuda:{torch.cuda.current_device()}, where kernels "
            f"are launched; try torch.cuda.set_device({tensor.device.index})"
        )
    return "triton"


def _check_dtype(tensor: torch.Tensor, operator: str) -> None:
    """Raises ValueError for the dtypes that only the reference serves."""
    if tensor.dtype == torch.float64:
        raise ValueError(
            f"{operator}'s kernels compute in float32, so float64 must not reach them; try impl='reference', or float32"
        )
    if tensor.dtype == torch.bfloat16 and tensor.is_cpu:
        raise ValueError(
            f"impl='triton' of {operator} on a CPU is Triton's interpreter, whose bfloat16 is wrong; try float32 or float16, or impl='reference'"
        )


def _interpreting() -> bool:
    """Whether Triton was imported (or will be) with its interpreter on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
