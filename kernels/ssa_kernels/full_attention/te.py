"""Transformer Engine's fused attention on packed documents: cuDNN's kernels with graphs kept from batch to batch.

On Hopper it does packed documents in two thirds of FlashAttention-2's time, and neither the number of documents nor the bound on their length
changes that: Transformer Engine rounds both up to sizes for which it builds a graph once. The call is the one its own attention module
makes; it gives the log-sum-exp as [tokens, H] (cuDNN 9.6 and later on sm_90 and sm_100), natural logarithm.

Not used in deterministic mode: asked for a deterministic backward on packed documents, version 2.20 with cuDNN 9.19 wants terabytes.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

# The first version whose signature this file was run against.
OLDEST = (2, 20)
LAYOUT = {"qkv_layout": "thd_thd_thd", "o_format": "thd", "attn_mask_type": "padding_causal"}


@cache
def is_installed() -> bool:
    """Whether a recent enough Transformer Engine with its torch extension is there; importing it takes seconds, so nothing is imported."""
    try:
        version("transformer_engine_torch")
        major, minor = version("transformer_engine").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= OLDEST


def te_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [tokens, H, D], lse [tokens, H, 1], random state)."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    o, (lse, state) = fused_attn.fused_attn_fwd(
        True, max_length, max_length, cu_seqlens, cu_seqlens, q, k, v, q.dtype, fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"],
        cu_seqlens_q_padded=cu_seqlens, cu_seqlens_kv_padded=cu_seqlens, attn_scale=scale, **LAYOUT,
    )  # fmt: skip
    if lse.shape != (*q.shape[:2], 1):
        raise ValueError(
            f"lse of Transformer Engine has shape {tuple(lse.shape)}, not [tokens, H, 1]: cuDNN is too old; try backend='flash'"
        )
    return o, lse, state


def te_backward(
    grad_o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, state: torch.Tensor,
    cu_seqlens: torch.Tensor, max_length: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (dq, dk, dv); lse [tokens, H, 1] and the state as the forward gave them."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    dq, dk, dv, *_ = fused_attn.fused_attn_bwd(
        max_length, max_length, cu_seqlens, cu_seqlens, q, k, v, o, grad_o, q.dtype, [lse, state],
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"], cu_seqlens_q_padded=cu_seqlens, cu_seqlens_kv_padded=cu_seqlens,
        attn_scale=scale, do_format="thd", dqkv_layout="thd_thd_thd", **LAYOUT,
    )  # fmt: skip
    return dq, dk, dv
