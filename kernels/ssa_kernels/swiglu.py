"""`swiglu`: y = silu(a) * b for a projection [a, b]."""

import torch
import torch.nn.functional as F

from .checks import check_floats, check_tensors
from .dispatch import dense_gradient, past_modes, resolve_impl


@past_modes
def swiglu(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns silu of x's first half times its second half: `[..., F]` in x's dtype for x `[..., 2 F]`; differentiable.

    The reference rounds to x's dtype after each operation, as megatron-core does. The kernels compute in float32 and round once.

    Args:
        x: one dim or more.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for another shape or dtype, and for inputs that the implementation does not support (float64: reference only).
    """
    check_tensors(x=x)
    check_floats(x=x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x {tuple(x.shape)} must have an even last size: gate and value side by side")
    x = x.contiguous()
    if resolve_impl(impl, x, "swiglu") == "reference":
        a, b = torch.chunk(x, 2, dim=-1)
        return dense_gradient(F.silu(a) * b)
    from .swiglu_triton import SwiGLU  # imported here because Triton may be missing on a CPU machine

    return SwiGLU.apply(x)
