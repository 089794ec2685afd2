"""`window_attention` and `compressed_attention`: the public functions, their checks and the choice of implementation."""

import torch

from ..checks import aligned, check_attention, check_scale, check_whole
from ..dispatch import past_modes, resolve_impl
from ..documents import INT32_MAX, DocumentLayout, as_layout
from .reference import compressed_attention_reference, window_attention_reference


@past_modes
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse): causal softmax attention of each query over the last `window` keys of its document, its own included.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        window: keys per query at most.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it, also one of some of the queries.
        scale: factor of the logits, default D^-1/2.
        impl: None, "triton" or "reference".

    Returns:
        o `[tokens, H, D]` in q's dtype, differentiable in q, k and v, and lse `[tokens, H]`, float32, natural logarithm, no gradient.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only;
            the kernels need D in [16, 128] and H / G up to 32).
    """
    check_attention(q=q, k=k, v=v)
    scale = check_scale(scale, q.shape[-1])
    window = min(check_whole("window", window, least=1, hint=": keys per query; try 128"), INT32_MAX)
    layout = _layout(cu_seqlens, q, k)
    q, k, v = (x.contiguous() for x in (q, k, v))
    if resolve_impl(impl, q, "window_attention") == "triton":
        _check_triton(q, k)
        from .autograd import WindowAttention  # imported here because Triton may be missing on a CPU machine

        return WindowAttention.apply(aligned(q), aligned(k), aligned(v), layout, window, scale)
    return window_attention_reference(q, k, v, layout=layout, window=window, scale=scale)


@past_modes
def compressed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse): softmax attention of each query over the mean keys and mean values of its document's complete blocks.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        block_size: keys per block. A block is complete at the position of its last key and later; one cut short by the document's end never is.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it, also one of some of the queries.
        scale: factor of the logits, default D^-1/2.
        impl: None, "triton" or "reference".

    Returns:
        o `[tokens, H, D]` in q's dtype, differentiable in q, k and v, and lse `[tokens, H]`, float32, natural logarithm, no gradient. A query
        before the end of its document's first block gets o = 0 and lse = -inf.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only;
            the kernels need D in [16, 128] and H / G up to 32).
    """
    check_attention(q=q, k=k, v=v)
    scale = check_scale(scale, q.shape[-1])
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    q, k, v = (x.contiguous() for x in (q, k, v))
    if resolve_impl(impl, q, "compressed_attention") == "triton":
        _check_triton(q, k)
        from .autograd import CompressedAttention  # imported here because Triton may be missing on a CPU machine

        return CompressedAttention.apply(aligned(q), aligned(k), aligned(v), layout, scale)
    return compressed_attention_reference(q, k, v, layout=layout, scale=scale)


def _layout(cu_seqlens: torch.Tensor | DocumentLayout, q: torch.Tensor, k: torch.Tensor) -> DocumentLayout:
    """Returns the layout of documents, whose blocks the window does not read."""
    block_size = cu_seqlens.block_size if isinstance(cu_seqlens, DocumentLayout) else 16
    return as_layout(cu_seqlens, q, k, block_size=block_size)


def _check_triton(q: torch.Tensor, k: torch.Tensor) -> None:
    group_size, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    if group_size > 32 or not 16 <= head_dim <= 128:
        raise ValueError(
            f"H / G = {group_size} and D = {head_dim} must be at most 32 and in [16, 128] for the Triton kernels; try impl='reference'"
        )
