"""The convolution of keys in plain PyTorch: the definition of the operator, and the implementation for a CPU.

Per channel of a kv head, with taps w_0 (the token itself) to w_{W-1}:

    c[t] = sum over l < W, l <= position[t], of w_l * k[t - l]
    out[t] = k[t] + silu(c[t])

The sum ends where the token's document begins. `weight[channel, 0, W - 1 - l]` is w_l: a depthwise Conv1d's layout. Everything is computed in
float32 (float64 for float64 inputs) and rounded once.

Source: FlashMoBA, arXiv 2511.11571: a depthwise causal convolution of width 3 or 5 on keys, with SiLU and a residual.
"""

import torch
import torch.nn.functional as F

from ..dispatch import dense_gradient


def key_convolution_reference(k_TGD: torch.Tensor, weight: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Returns the convolved keys; arguments as in `key_convolution`."""
    tokens, kv_heads, head_dim = k_TGD.shape
    k = k_TGD.to(torch.promote_types(k_TGD.dtype, torch.float32))
    taps_WGD = weight.to(k.dtype).view(kv_heads, head_dim, -1).permute(2, 0, 1).flip(0)
    total = k * taps_WGD[0]
    for distance in range(1, len(taps_WGD)):
        earlier = F.pad(k, (0, 0, 0, 0, distance, 0))[:tokens]
        seen = (positions_T >= distance)[:, None, None]
        total = total + torch.where(seen, earlier, 0.0) * taps_WGD[distance]
    return dense_gradient((k + F.silu(total)).to(k_TGD.dtype))
