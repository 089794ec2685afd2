"""`gate_and_align`: the public function, its checks and the choice of implementation."""

import torch

from ..dispatch import past_modes, resolve_impl
from .reference import gate_and_align_reference


@past_modes
def gate_and_align(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    main: str | torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, loss): the gated main stream and the layer's alignment loss.

    Args:
        o_full, o_sparse: `[tokens, H, D]`, both streams' outputs.
        gate_logits: `[tokens, H]`.
        main: the stream that becomes `out`: "full", "sparse", or a tensor of one integer or bool beside the others, not 0 for full
            (a drawn stream that stays on the device: no synchronisation, and a CUDA graph can be replayed with another draw).
        weights: of the sparsity loss (gradient into the full stream) and the commitment loss (into the sparse stream).
        impl: None, "triton" or "reference".

    Returns:
        out `[tokens, H, D]` in o_full's dtype, and the loss, a float32 scalar: the mean over tokens x H x D. Differentiable in
        o_full, o_sparse and gate_logits. Bit-identical from run to run.
    """
    check_gate_inputs(o_full, gate_logits, main)
    if o_sparse.shape != o_full.shape:
        raise ValueError(f"o_sparse {tuple(o_sparse.shape)} must fit o_full {tuple(o_full.shape)}: the same shape")
    if resolve_impl(impl, o_full, "gate_and_align") == "reference":
        return gate_and_align_reference(o_full, o_sparse, gate_logits, main=main, weights=weights)
    from .autograd import GateAndAlign  # here, because it imports Triton

    tensors = (x.contiguous() for x in (o_full, o_sparse, gate_logits))
    return GateAndAlign.apply(*tensors, main_operand(main), tuple(weights))


def check_gate_inputs(o: torch.Tensor, gate_logits: torch.Tensor, main: str | torch.Tensor) -> None:
    """Raises ValueError unless the logits fit a stream's output (or q) and main names a stream."""
    if isinstance(main, str):
        if main not in ("full", "sparse"):
            raise ValueError(f"main={main!r} must be 'full', 'sparse' or a tensor of one integer (not 0 for full)")
    elif main.numel() != 1 or main.is_floating_point() or main.device != o.device:
        raise ValueError(
            f"main of shape {tuple(main.shape)}, {main.dtype} on {main.device} must be one integer or bool on {o.device}"
        )
    if o.dim() != 3 or gate_logits.shape != o.shape[:2]:
        raise ValueError(
            f"gate_logits {tuple(gate_logits.shape)} must fit o_full {tuple(o.shape)}: its first two sizes"
        )


def main_operand(main: str | torch.Tensor) -> str | torch.Tensor:
    """Returns main as the kernels take it: a name, or an int32 tensor."""
    return main if isinstance(main, str) else main.to(torch.int32)
