"""`key_convolution`: the public function, its checks and the choice of implementation."""

import torch

from ..checks import INTEGERS, check_floats, check_tensors, looks_at_values
from ..dispatch import past_modes, resolve_impl
from .reference import key_convolution_reference

MAX_TAPS = 16


@past_modes
def key_convolution(
    k: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Returns the convolved keys, `[tokens, G, D]` in k's dtype, differentiable in k and the weight: reference.py has the definition.

    Args:
        k: `[tokens, G, D]`, keys before RoPE, of documents packed one after another.
        weight: `[G * D, 1, W]` with W from 1 to 16, in k's dtype or float32, one filter per channel of a kv head; the layout of a
            depthwise `torch.nn.Conv1d`, whose last tap is the token itself.
        positions: int64 or int32 `[tokens]`, each token's position in its document. A token at position p sees at most p earlier ones,
            so nothing crosses a document. A CPU refuses a position that the tokens before it cannot reach; kernels read no key before the first.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    check_tensors(k=k, weight=weight, positions=positions)
    check_floats(k=k)
    if k.dim() != 3 or 0 in k.shape[1:]:
        raise ValueError(f"k {tuple(k.shape)} must be [tokens, G, D] with at least one head and element")
    channels = k.shape[1] * k.shape[2]
    fits = weight.dim() == 3 and weight.shape[:2] == (channels, 1) and 1 <= weight.shape[2] <= MAX_TAPS
    if not fits or weight.dtype not in (k.dtype, torch.float32):
        raise ValueError(
            f"weight {tuple(weight.shape)}, {weight.dtype} must be [{channels}, 1, W], W from 1 to {MAX_TAPS}, one filter per channel of "
            f"k {tuple(k.shape)}, of {k.dtype} or float32"
        )
    if positions.shape != k.shape[:1] or positions.dtype not in INTEGERS:
        raise ValueError(
            f"positions {tuple(positions.shape)}, {positions.dtype} must be one integer for each of {k.shape[0]} tokens of k, int64 or int32"
        )
    if looks_at_values(positions) and len(positions) and int(positions.min()) < 0:
        raise ValueError(f"positions from {int(positions.min())} must not be negative")
    k, weight, positions = k.contiguous(), weight.contiguous(), positions.contiguous()
    if resolve_impl(impl, k, "key_convolution") == "reference":
        return key_convolution_reference(k, weight, positions)
    from .triton import KeyConvolution  # imported here because Triton may be missing on a CPU machine

    return KeyConvolution.apply(k, weight, positions)
