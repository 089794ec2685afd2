"""`gate`: out = o * sigmoid(logits), one gate a token and head. The public function, its reference and the choice of implementation."""

import torch

from ..checks import check_gate
from ..dispatch import dense_gradient, past_modes, resolve_impl


@past_modes
def gate(o: torch.Tensor, gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns the gated stream `[tokens, H, D]` in o's dtype, computed in float32 (float64 for float64); differentiable in both.

    Args:
        o: `[tokens, H, D]`, a stream's output.
        gate_logits: `[tokens, H]`, in o's dtype or float32.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for what an implementation does not serve (float64: the reference only).
    """
    check_gate("o", o, gate_logits)
    o, gate_logits = o.contiguous(), gate_logits.contiguous()
    if resolve_impl(impl, o, "gate") == "reference":
        wide = torch.promote_types(o.dtype, torch.float32)
        return dense_gradient((o.to(wide) * gate_logits.to(wide).sigmoid().unsqueeze(-1)).to(o.dtype))
    from .autograd import Gate  # here, because it imports Triton

    return Gate.apply(o, gate_logits)
