"""`gate`: out = o * sigmoid(logits), one gate a token and head. The public function, its reference and the choice of implementation."""

import torch

from ..dispatch import past_modes, resolve_impl


@past_modes
def gate(o: torch.Tensor, gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns the gated stream `[tokens, H, D]` in o's dtype, computed in float32 (float64 for float64); differentiable in both.

    Args:
        o: `[tokens, H, D]`, a stream's output.
        gate_logits: `[tokens, H]`.
        impl: None, "triton" or "reference".
    """
    if o.dim() != 3 or gate_logits.shape != o.shape[:2]:
        raise ValueError(f"gate_logits {tuple(gate_logits.shape)} must fit o {tuple(o.shape)}: its first two sizes")
    if resolve_impl(impl, o, "gate") == "reference":
        wide = torch.promote_types(o.dtype, torch.float32)
        return (o.to(wide) * gate_logits.to(wide).sigmoid().unsqueeze(-1)).to(o.dtype)
    from .autograd import Gate  # here, because it imports Triton

    return Gate.apply(o.contiguous(), gate_logits.contiguous())
