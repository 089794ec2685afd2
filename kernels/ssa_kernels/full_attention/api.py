"""`full_attention`: the public function, its checks, its autograd function and the choice of implementation."""

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned, check_attention, check_scale, check_whole, looks_at_values
from ..dispatch import past_modes, resolve_impl
from ..documents import DocumentLayout, check_documents
from .fused import check_backend, fused_backward, fused_forward, plan_fused
from .reference import full_attention_reference


@past_modes
def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    return_lse: bool = False,
    num_rows: int | None = None,
    backend: str | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse), differentiable in q, k and v.

    On a GPU a library's kernel is chosen from shapes, arguments and the installed libraries, without reading the documents' boundaries (fused.py).
    Pass a layout with `max_length` if it is known: FlashAttention's backward over 8k rows takes twice as long when it must expect a document
    of all tokens. For some of the queries over all keys, pass a layout by `query_spans` (or, for the reference, by `query_slice`).

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        return_lse: whether to return the log-sum-exp, `[tokens, H]`, float32, natural logarithm, no gradient. Otherwise it is None.
        num_rows: states that the documents are exactly this many rows of equal length, which allows the fastest kernel. It is checked on a
            CPU, and trusted on a GPU, where checking would mean waiting.
        backend: the fused kernel to use on a GPU: None, "cudnn", "te" or "flash", the first two for D up to 128. fused.py explains the default.
        impl: None, "triton" (the fused GPU kernels) or "reference". This operator has no Triton kernel of its own, so CPU tensors under
            Triton's interpreter run the reference.

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (the GPU kernels need
            bfloat16 or float16, and D a multiple of 8 up to 256).
    """
    check_attention(q=q, k=k, v=v)
    check_documents(cu_seqlens, q, k)
    check_rows(cu_seqlens, q.shape[0], num_rows)
    check_backend(backend, num_rows, q.shape[-1])
    scale = check_scale(scale, q.shape[-1])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # Transformer Engine ignores strides
    if resolve_impl(impl, q, "full_attention") == "triton" and q.is_cuda:
        return _FullAttention.apply(
            aligned(q), aligned(k), aligned(v), cu_seqlens, num_rows, backend, scale, return_lse
        )
    return full_attention_reference(q, k, v, cu_seqlens=cu_seqlens, scale=scale, return_lse=return_lse)


class _FullAttention(torch.autograd.Function):
    """(q, k, v, cu_seqlens, num_rows, backend, scale, return_lse) -> (o, lse or None). Saves q, k, v, o and the library's log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, num_rows, backend, scale, return_lse):
        plan, ends = plan_fused(q, k, cu_seqlens, num_rows=num_rows, backend=backend, scale=scale)
        o, lse, *states = fused_forward(q, k, v, ends, plan)
        ctx.save_for_backward(q, k, v, o, lse, ends, *states)
        ctx.plan = plan
        lse_TH = lse.reshape(q.shape[:2]).contiguous() if return_lse else None
        if lse_TH is not None:
            ctx.mark_non_differentiable(lse_TH)
        return o, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, _):
        q, k, v, o, lse, ends, *states = ctx.saved_tensors
        dq, dk, dv = fused_backward(aligned(grad_o), q, k, v, o, lse, tuple(states), ends, ctx.plan)
        return dq, dk.to(k.dtype), dv.to(v.dtype), *(None,) * 5


def check_rows(cu_seqlens: torch.Tensor | DocumentLayout, tokens: int, num_rows: object) -> None:
    """Raises ValueError unless num_rows is None or divides the tokens and, on a CPU, the documents are rows of equal length."""
    if num_rows is None:
        return
    rows = check_whole("num_rows", num_rows, least=1, hint=", or None")
    if isinstance(cu_seqlens, DocumentLayout):
        tokens = cu_seqlens.num_tokens  # more than the queries of a layout by `query_spans`
    if tokens % rows:
        raise ValueError(f"num_rows={rows} must divide tokens={tokens}; try None for documents of any length")
    ends = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else cu_seqlens
    if not looks_at_values(ends):
        return
    lengths = (ends[1:] - ends[:-1])[:rows]
    if len(lengths) < rows or (lengths * rows != tokens).any():
        raise ValueError(
            f"num_rows={rows} must mean that the documents are equal rows of {tokens} tokens, got {ends.tolist()[:8]}...; try None"
        )
