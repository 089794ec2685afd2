"""`swiglu`: y = silu(a) * b for a projection [a, b]. The public function, its reference and the choice of implementation."""

import torch
import torch.nn.functional as F

from ..checks import check_floats, check_tensors
from ..dispatch import dense_gradient, past_modes, resolve_impl


@past_modes
def swiglu(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns `[..., F]` in x's dtype for x `[..., 2 F]`: silu of the first half times the second; differentiable.

    The reference works in x's dtype, operation by operation, as the library's own does; the kernels in float32 with one rounding.

    Args:
        x: one dim or more.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for another shape or dtype, and for what an implementation does not serve (float64: the reference only).
    """
    check_tensors(x=x)
    check_floats(x=x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x {tuple(x.shape)} must have an even last size: gate and value side by side")
    x = x.contiguous()
    if resolve_impl(impl, x, "swiglu") == "reference":
        a, b = torch.chunk(x, 2, dim=-1)
        return dense_gradient(F.silu(a) * b)
    from .autograd import SwiGLU  # here, because it imports Triton

    return SwiGLU.apply(x)
