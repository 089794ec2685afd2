"""Launching Triton kernels without paying the JIT's look-up each time.

`kernel[grid](...)` inspects every argument in Python and asks the driver about every pointer before it launches: 50 to 90 microseconds on
a slow host, more than many of these kernels run for, and a layer has two dozen of them. `launch` keeps the compiled kernel under what
the JIT would specialise it for (types, alignment to 16 bytes, the number 1, compile-time arguments) and hands over bare addresses.
Triton's interpreter, and what has not been launched before, go the ordinary way.
"""

from functools import cache
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(
    kernel: Any, grid: tuple[int, ...], *args: object, stream: torch.cuda.Stream | None = None, **settings: object
) -> None:
    """Launches a kernel.

    Args:
        kernel: a Triton or Gluon JIT function whose compile-time parameters come last.
        grid: one to three sizes.
        args: tensors, tensor descriptors, numbers: the run-time arguments in their order.
        stream: where to launch, by default the current stream.
        settings: compile-time arguments in their order, then options of the compiler, as num_warps.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **settings)
        return
    kinds, handed = [], []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            kinds.append((arg.dtype, address % 16 == 0))
            handed.append(address)
        else:
            kinds.append(_kind(arg))
            handed.append(arg)
    found = _compiled(kernel, tuple(settings.items()), tuple(kinds), torch.cuda.current_device())
    if not found:
        if stream is None:
            compiled = kernel[grid](*args, **settings)
        else:
            with torch.cuda.stream(stream):
                compiled = kernel[grid](*args, **settings)
        found += [compiled, [settings[name] for name in kernel.arg_names[len(args) :]]]
        return
    compiled, constants = found
    handle = {} if stream is None else {"stream": stream.cuda_stream}
    compiled[grid + (1,) * (3 - len(grid))](*handed, *constants, **handle)


def cdiv(number: int, divisor: int) -> int:
    """Returns the quotient, rounded up: `triton.cdiv` without the 10 microseconds that its way through the compiler's constants takes."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not below a positive number; as `cdiv`, for the host."""
    return 1 << (number - 1).bit_length()


@cache
def _compiled(kernel: JITFunction, settings: tuple, kinds: tuple, device: int) -> list:
    """A place for the compiled kernel and its constants: empty until the first launch fills it."""
    return []


def _kind(arg: object) -> object:
    """What a kernel is specialised for in an argument that is no tensor, or more."""
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape), len(arg.shape), arg.base.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    return type(arg)
