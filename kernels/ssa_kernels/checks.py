"""Checks of arguments that the public operators share. They run before an implementation is chosen, so both refuse the same arguments.

Types, dtypes, shapes, devices and plain numbers are checked on the host, in a few microseconds. Values inside tensors (boundaries, positions,
labels, chosen blocks) are checked on a CPU only, because on a GPU that would mean waiting. Each operator documents its behaviour on a GPU
with values out of range; no kernel reads or writes outside its tensors because of them.

Tensors may be views with any strides and any offset: operators make them contiguous, and `aligned` if a kernel needs it.
"""

import math
from numbers import Integral, Real

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
ALIGNMENT = 16  # bytes; vector loads, asynchronous copies and tensor maps require it


def check_tensors(**tensors: object) -> None:
    """Raises ValueError unless all are dense tensors with values on the device of the first."""
    first = device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a dense torch.Tensor, got {kind}")
        if device is None:
            first, device = name, tensor.device
            if tensor.is_meta:
                raise ValueError(f"{name} on meta holds no values; try {name} on 'cpu' or 'cuda'")
        elif tensor.device != device:
            raise ValueError(
                f"{name} on {tensor.device} must be on {first}'s device {device}; try {name}.to({first}.device)"
            )


def check_floats(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless each tensor has a dtype that operators compute in."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} of {tensor.dtype} must be bfloat16, float16, float32 or float64")


def check_one_dtype(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless all tensors have the first one's dtype, and operators compute in it."""
    (first, like), *rest = tensors.items()
    check_floats(**{first: like})
    for name, tensor in rest:
        if tensor.dtype != like.dtype:
            raise ValueError(
                f"{name} of {tensor.dtype} must have {first}'s dtype {like.dtype}; try {name}.to({first}.dtype)"
            )


def check_whole(name: str, value: object, *, least: int, hint: str = "") -> int:
    """Returns a plain number as an int. Raises ValueError for a number below `least`, a bool, a float or a tensor."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}{hint}")
    return int(value)


def check_number(name: str, value: object) -> float:
    """Returns a plain finite number as a float. Raises ValueError for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return float(value)


def check_scale(scale: object, head_dim: int) -> float:
    """Returns the logits' factor, by default D^-1/2."""
    return float(head_dim**-0.5) if scale is None else check_number("scale", scale)


def check_attention(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless q is [queries, H, D], and k (and v) [keys, G, D] with G dividing H, of one dtype on one device."""
    check_tensors(**tensors)
    check_one_dtype(**tensors)
    q, k, *v = tensors.values()
    fits = q.dim() == 3 and k.dim() == 3 and 0 not in q.shape and 0 not in k.shape
    if not fits or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or any(x.shape != k.shape for x in v):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        others = "k and v" if v else "k"
        raise ValueError(f"{shapes} must be [queries, H, D] and {others} [keys, G, D], no size 0, with G dividing H")


def check_gate(name: str, o: torch.Tensor, gate_logits: torch.Tensor) -> None:
    """Raises ValueError unless gate_logits are [tokens, H] in o's dtype or float32, for o [tokens, H, D], which messages call `name`."""
    check_tensors(**{name: o, "gate_logits": gate_logits})
    check_floats(**{name: o})
    if o.dim() != 3 or gate_logits.shape != o.shape[:2] or o.shape[2] < 1:
        raise ValueError(
            f"gate_logits {tuple(gate_logits.shape)} must fit {name} {tuple(o.shape)}: its first two sizes, of [tokens, H, D] with D at least 1"
        )
    if gate_logits.dtype not in (o.dtype, torch.float32):
        raise ValueError(
            f"gate_logits of {gate_logits.dtype} must have {name}'s dtype {o.dtype}, or float32; try gate_logits.float()"
        )


def looks_at_values(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's values may be read: only on a CPU, and not while torch.compile traces."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def elements_apart(tensor: torch.Tensor) -> bool:
    """Returns whether no two elements of a tensor overlap in memory, so that it can be written to."""
    reach = 1  # the first offset past what the dims so far cover
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor contiguous and starting at a multiple of 16 bytes, copied if necessary."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
