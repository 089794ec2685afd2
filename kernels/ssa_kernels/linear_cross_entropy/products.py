"""The weight's gradient: a matrix product that may accumulate into a float32 buffer."""

import torch


def weight_gradient(
    probabilities_TV: torch.Tensor, scaled_TM: torch.Tensor, accumulate_into: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns P^T (g h) in its inputs' dtype, or None after adding it to a float32 buffer."""
    left = probabilities_TV.t()
    if accumulate_into is None:
        return left @ scaled_TM
    if left.dtype == torch.float32:
        accumulate_into.addmm_(left, scaled_TM)
    elif left.is_cuda and accumulate_into.is_contiguous():
        # One product, bf16 in and float32 out, that reads and writes the buffer.
        torch.ops.aten.addmm.dtype_out(accumulate_into, left, scaled_TM, torch.float32, out=accumulate_into)
    elif left.is_cuda:
        accumulate_into.copy_(torch.ops.aten.addmm.dtype(accumulate_into.contiguous(), left, scaled_TM, torch.float32))
    else:
        accumulate_into.add_(left @ scaled_TM)
    return None
