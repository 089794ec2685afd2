"""`gate`: out = o * sigmoid(logits), one gate per token and head. For both streams at once: gate_and_align."""

import torch

from .checks import check_gate
from .dispatch import dense_gradient, past_modes, resolve_impl


@past_modes
def gate(o: torch.Tensor, gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns the gated stream `[tokens, H, D]` in o's dtype, differentiable in both arguments.

    It is computed in float32 (float64 for float64 inputs).

    Args:
        o: `[tokens, H, D]`, a stream's output.
        gate_logits: `[tokens, H]`, in o's dtype or float32.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    check_gate("o", o, gate_logits)
    o, gate_logits = o.contiguous(), gate_logits.contiguous()
    if resolve_impl(impl, o, "gate") == "reference":
        wide = torch.promote_types(o.dtype, torch.float32)
        return dense_gradient((o.to(wide) * gate_logits.to(wide).sigmoid().unsqueeze(-1)).to(o.dtype))
    from .gate_triton import Gate  # imported here because Triton may be missing on a CPU machine

    return Gate.apply(o, gate_logits)
