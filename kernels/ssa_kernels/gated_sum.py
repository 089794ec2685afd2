"""`gated_sum`: out = sum over branches of o * sigmoid(logits), one gate per token, head and branch. For one branch: gate."""

from collections.abc import Sequence

import torch

from .checks import check_floats, check_one_dtype, check_tensors
from .dispatch import dense_gradient, past_modes, resolve_impl

BRANCHES = 3


@past_modes
def gated_sum(branches: Sequence[torch.Tensor], gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns the sum of the gated branches, `[tokens, H, D]` in their dtype, differentiable in all arguments.

    It is computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        branches: three of `[tokens, H, D]`, of one dtype.
        gate_logits: `[tokens, H, 3]`, in the branches' dtype or float32.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    if not isinstance(branches, Sequence) or len(branches) != BRANCHES:
        raise ValueError(f"branches must be {BRANCHES} tensors [tokens, H, D], got {type(branches).__name__}")
    named = {f"branch {i}": x for i, x in enumerate(branches)}
    check_tensors(**named, gate_logits=gate_logits)
    check_one_dtype(**named)
    check_floats(gate_logits=gate_logits)
    first = branches[0]
    if first.dim() != 3 or first.shape[2] < 1 or any(x.shape != first.shape for x in branches):
        raise ValueError(
            f"branches {[tuple(x.shape) for x in branches]} must have one shape [tokens, H, D], D at least 1"
        )
    if gate_logits.shape != (*first.shape[:2], BRANCHES) or gate_logits.dtype not in (first.dtype, torch.float32):
        raise ValueError(
            f"gate_logits {tuple(gate_logits.shape)}, {gate_logits.dtype} must be [{first.shape[0]}, {first.shape[1]}, {BRANCHES}] in the "
            f"branches' dtype {first.dtype}, or float32"
        )
    branches, gate_logits = [x.contiguous() for x in branches], gate_logits.contiguous()
    if resolve_impl(impl, first, "gated_sum") == "reference":
        wide = torch.promote_types(first.dtype, torch.float32)
        gates = gate_logits.to(wide).sigmoid()
        total = sum(x.to(wide) * gates[..., i, None] for i, x in enumerate(branches))
        assert isinstance(total, torch.Tensor)
        return dense_gradient(total.to(first.dtype))
    from .gated_sum_triton import GatedSum  # imported here because Triton may be missing on a CPU machine

    return GatedSum.apply(*branches, gate_logits)
