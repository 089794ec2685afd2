"""Launching Triton kernels without the JIT's look-up at every call, and the stream for work beside the current one.

`kernel[grid](...)` inspects every argument in Python and asks the driver about every pointer before it launches. That takes 50 to 90
microseconds on a slow host, more than many of these kernels run for, and a layer launches two dozen of them. `launch` keeps the compiled
kernel under the properties that the JIT would specialise it for (types, alignment to 16 bytes, the number 1, compile-time arguments) and passes bare
addresses. Triton's interpreter, and each kernel's first launch, take the ordinary path.
"""

from functools import cache
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Products and sums become fused multiply-adds, with which the kernels are measured. Triton's default until 3.9, which warns that 3.10 has another.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: object, stream: torch.cuda.Stream | None = None, **settings: object
) -> None:
    """Launches a kernel.

    Args:
        kernel: a Triton or Gluon JIT function whose compile-time parameters come last.
        grid: one to three sizes.
        args: the run-time arguments in order: tensors, tensor descriptors, numbers.
        stream: where to launch, by default on the current stream.
        settings: compile-time arguments in order, then compiler options such as num_warps.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **settings)
        return
    kinds, passed = [], []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            kinds.append((arg.dtype, address % 16 == 0))
            passed.append(address)
        else:
            kinds.append(_kind(arg))
            passed.append(arg)
    found = _compiled(kernel, tuple(settings.items()), tuple(kinds), torch.cuda.current_device())
    if not found:
        if stream is None:
            compiled = kernel[grid](*args, **settings, **COMPILER_OPTIONS)
        else:
            with torch.cuda.stream(stream):
                compiled = kernel[grid](*args, **settings, **COMPILER_OPTIONS)
        found += [compiled, [settings[name] for name in kernel.arg_names[len(args) :]]]
        return
    compiled, constants = found
    handle = {} if stream is None else {"stream": stream.cuda_stream}
    compiled[grid + (1,) * (3 - len(grid))](*passed, *constants, **handle)


@cache
def high_priority_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the device's stream whose kernels are scheduled before other waiting ones; the same stream at every call.

    It is for work of a different kind beside the current stream's: small kernels behind a large one, top-k beside later softmax sums.
    Creating a stream costs more than the work that it hides, so there is one per device. Callers make it wait for the current stream
    first, and the current stream wait for it afterwards. To their own callers everything then happens in order. CUDA graphs capture both
    streams, and neither waits on the host.
    """
    return torch.cuda.Stream(device, priority=-1)


def cdiv(number: int, divisor: int) -> int:
    """Returns the quotient, rounded up. `triton.cdiv` takes 10 microseconds, because it goes through the compiler's constants."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is at least `number`, a positive number. For the host, like `cdiv`."""
    return 1 << (number - 1).bit_length()


@cache
def _compiled(kernel: JITFunction, settings: tuple, kinds: tuple, device: int) -> list:
    """Returns the list that holds the compiled kernel and its constants. It is empty until the first launch fills it."""
    return []


def _kind(arg: object) -> object:
    """Returns the part of the key for an argument that is not a tensor: at least as fine as the JIT's specialisation."""
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape), len(arg.shape), arg.base.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    return type(arg)
