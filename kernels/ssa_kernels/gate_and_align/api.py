"""`gate_and_align`: the public function, its checks and the choice of implementation."""

import torch

from ..dispatch import resolve_impl
from .reference import gate_and_align_reference


def gate_and_align(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    main: str,
    weights: tuple[float, float] = (1.0, 1.0),
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, loss): the gated main stream and the layer's alignment loss.

    Args:
        o_full, o_sparse: `[tokens, H, D]`, both streams' outputs.
        gate_logits: `[tokens, H]`.
        main: "full" or "sparse", the stream that becomes `out`.
        weights: of the sparsity loss (gradient into the full stream) and the commitment loss (into the sparse stream).
        impl: None, "triton" or "reference".

    Returns:
        out `[tokens, H, D]` in o_full's dtype, and the loss, a float32 scalar: the mean over tokens x H x D. Differentiable in
        o_full, o_sparse and gate_logits.
    """
    if main not in ("full", "sparse"):
        raise ValueError(f"main={main!r} must be 'full' or 'sparse'")
    if o_sparse.shape != o_full.shape or gate_logits.shape != o_full.shape[:2]:
        raise ValueError(
            f"o_sparse {tuple(o_sparse.shape)} and gate_logits {tuple(gate_logits.shape)} must fit o_full {tuple(o_full.shape)}: "
            "the same shape, and its first two sizes"
        )
    if resolve_impl(impl, o_full, "gate_and_align") == "triton":
        raise NotImplementedError("gate_and_align has no Triton kernels yet; try impl='reference'")
    return gate_and_align_reference(o_full, o_sparse, gate_logits, main=main, weights=weights)
