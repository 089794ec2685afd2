"""Attention that rounds where every fused kernel in 16 bits must, and is exact elsewhere: a baseline for kernels, in plain PyTorch.

A tensor core multiplies 16-bit numbers and adds in float32. So a kernel rounds what it multiplies, p (before p v and p^T do) and ds (before ds k and
ds^T q), and what it stores: o, of which the backward takes delta = rowsum(do o), and the gradients. FlashAttention-2 (arXiv 2307.08691) rounds at
the same places. The references of ssa_kernels on a GPU are written out in float32 and round results only: for a kernel they would be a baseline that it
cannot reach, by a factor of 2^0.5 in dq even with an exact delta.

Sums and exponentials are in float64 here, so the distance from the exact result is that of the roundings. p is rounded before its division by the
softmax's sum, as an online softmax does.
"""

import torch


def rounded_attention(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    do_THD: torch.Tensor,
    mask_TS: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, dq), rounded, and the sums (dk, dv), not rounded; all float64. A query that sees no key gets 0.

    Args:
        q_THD, do_THD: queries and the gradient of o, in the dtype to which is rounded.
        k_SGD, v_SGD: keys and values in that dtype, G dividing H.
        mask_TS: bool, True if the query may attend to the key.
        scale: factor of the logits.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(q_THD.dtype).double()

    heads, (keys, kv_heads, dim) = q_THD.shape[1], k_SGD.shape
    group = heads // kv_heads
    q, do = (x.double().transpose(0, 1) for x in (q_THD, do_THD))
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (k_SGD, v_SGD))
    sees = mask_TS.any(1)[:, None]
    logits = (q @ k.mT * scale).masked_fill(~(mask_TS | ~sees), float("-inf"))
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * sees
    total = weights.sum(-1, keepdim=True) + ~sees
    o = rounded(rounded(weights) @ v / total)
    p = weights / total
    ds = rounded(p * (do @ v.mT - (do * o).sum(-1, keepdim=True)))
    dk, dv = (
        product.view(kv_heads, group, keys, dim).sum(1).transpose(0, 1)
        for product in (scale * (ds.mT @ q), rounded(p).mT @ do)
    )
    return o.transpose(0, 1), rounded(scale * (ds @ k)).transpose(0, 1), dk, dv
