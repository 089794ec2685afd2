"""The gate on both streams and their alignment loss in plain PyTorch: the definition of the operator, and the implementation for a CPU.

g = sigmoid(gate_logits), f = g * o_full, s = g * o_sparse; out = f or s. With sg the stop-gradient and l(a, b) the mean over
tokens x H x D of SmoothL1 with beta 1 (d^2 / 2 for |d| < 1, else |d| - 1/2):

    loss = w_sparsity l(f, sg(s)) + w_commitment l(sg(f), s)

With N = tokens * H * D, the gradient into f is w_sparsity clip(f - s, -1, 1) / N, and the one into s is -w_commitment clip(f - s, -1, 1) / N.
Everything is computed in float32 (float64 for float64 inputs). Source: arXiv 2511.20102, section 3.3.

The loss is the mean over the heads that are passed. Under tensor parallelism each rank passes its own, and the caller averages.
"""

import torch
import torch.nn.functional as F

from ..dispatch import dense_gradient


def gate_and_align_reference(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    main: str | torch.Tensor,
    weights: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, loss); arguments as in `gate_and_align`."""
    wide = torch.promote_types(o_full.dtype, torch.float32)
    gate = torch.sigmoid(gate_logits.to(wide))[..., None]
    full, sparse = gate * o_full.to(wide), gate * o_sparse.to(wide)
    mean = "mean" if o_full.numel() else "sum"  # the mean of no elements would be NaN
    sparsity = F.smooth_l1_loss(full, sparse.detach(), reduction=mean)
    commitment = F.smooth_l1_loss(full.detach(), sparse, reduction=mean)
    if isinstance(main, str):
        out = full if main == "full" else sparse
    else:
        out = torch.where(main.reshape(()) != 0, full, sparse)
    return dense_gradient(out.to(o_full.dtype)), weights[0] * sparsity + weights[1] * commitment
