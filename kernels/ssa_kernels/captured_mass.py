"""The share of full attention that the chosen blocks capture, from both streams' log-sum-exps.

m = exp(lse_sparse - lse_full). The sparse stream's normaliser is the full stream's over a subset of its keys, so m is in [0, 1] up to
rounding, and it is 1 if the blocks cover everything. The paper calls it attention sparsity (arXiv 2511.20102, Theorem 1:
||h_full - h_sparse|| <= (1 - m) (max ||v_dropped|| + ||h_sparse||)).
"""

import torch

from .checks import check_tensors

WIDE = (torch.float32, torch.float64)


def captured_mass(lse_full: torch.Tensor, lse_sparse: torch.Tensor) -> torch.Tensor:
    """Returns m per token and head, float32 `[tokens, H]`, from both streams' natural log-sum-exp of that shape, float32 or float64.

    Raises:
        ValueError: for tensors that differ in shape or device, and for another dtype.
    """
    check_tensors(lse_full=lse_full, lse_sparse=lse_sparse)
    for name, lse in (("lse_full", lse_full), ("lse_sparse", lse_sparse)):
        if lse.dtype not in WIDE:
            raise ValueError(f"{name} of {lse.dtype} must be float32 or float64, as the attention operators return it")
    if lse_full.shape != lse_sparse.shape:
        raise ValueError(f"lse_sparse of shape {tuple(lse_sparse.shape)} must have lse_full's {tuple(lse_full.shape)}")
    return torch.exp(lse_sparse.detach().float() - lse_full.detach().float())
