"""`gate_and_align`: the public function, its checks and the choice of implementation."""

import torch

from ..checks import check_gate, check_number, check_one_dtype, check_tensors
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
        o_full, o_sparse: `[tokens, H, D]`, both streams' outputs, of one dtype.
        gate_logits: `[tokens, H]`, in their dtype or float32.
        main: the stream that becomes `out`: "full", "sparse", or a tensor of one integer or bool on their device, 0 for sparse and
            anything else for full. A drawn stream that stays on the device needs no synchronisation, and a CUDA graph can be replayed
            with another draw.
        weights: of the sparsity loss (its gradient goes into the full stream) and of the commitment loss (into the sparse stream).
        impl: None, "triton" or "reference".

    Returns:
        out `[tokens, H, D]` in o_full's dtype, and the loss, a float32 scalar: the mean over tokens x H x D. Both are differentiable
        in o_full, o_sparse and gate_logits, and bit-identical from run to run. Without tokens or heads the loss is 0.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    check_gate_inputs("o_full", o_full, gate_logits, main)
    weights = check_weights(weights)
    check_tensors(o_full=o_full, o_sparse=o_sparse)
    check_one_dtype(o_full=o_full, o_sparse=o_sparse)
    if o_sparse.shape != o_full.shape:
        raise ValueError(f"o_sparse {tuple(o_sparse.shape)} must fit o_full {tuple(o_full.shape)}: the same shape")
    tensors = tuple(x.contiguous() for x in (o_full, o_sparse, gate_logits))
    if resolve_impl(impl, o_full, "gate_and_align") == "reference":
        return gate_and_align_reference(*tensors, main=main, weights=weights)
    from .triton import GateAndAlign  # imported here because Triton may be missing on a CPU machine

    return GateAndAlign.apply(*tensors, main_operand(main), weights)


def check_gate_inputs(name: str, o: torch.Tensor, gate_logits: torch.Tensor, main: str | torch.Tensor) -> None:
    """Raises ValueError unless the logits fit `o`, which messages call `name`, and main names a stream."""
    check_gate(name, o, gate_logits)
    if not isinstance(main, torch.Tensor):
        if not isinstance(main, str) or main not in ("full", "sparse"):
            raise ValueError(
                f"main={main!r} must be 'full', 'sparse' or a tensor of one integer (0 for sparse, else full)"
            )
        return
    check_tensors(**{name: o, "main": main})
    if main.numel() != 1 or main.is_floating_point() or main.is_complex():
        raise ValueError(
            f"main of shape {tuple(main.shape)} and {main.dtype} must be one integer or bool (0 for sparse, else full)"
        )


def check_weights(weights: object) -> tuple[float, float]:
    """Returns the two weights as floats. Raises ValueError for anything but two finite numbers."""
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        raise ValueError(
            f"weights={weights!r} must be two numbers, of the sparsity and the commitment loss; try (1.0, 1.0)"
        )
    sparsity, commitment = weights
    return check_number("weights[0]", sparsity), check_number("weights[1]", commitment)


def main_operand(main: str | torch.Tensor) -> str | torch.Tensor:
    """Returns main as the kernels take it: a name, or an int32 tensor that is 0 if main is."""
    if isinstance(main, str) or main.dtype == torch.int32:
        return main
    return (main != 0).to(torch.int32)
