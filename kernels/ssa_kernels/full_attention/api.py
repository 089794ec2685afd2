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

    On a GPU a library's kernel is chosen from shapes, arguments and what is installed, without looking at the documents (fused.py). Give
    a layout with `max_length` where that is known: FlashAttention's backward over 8k rows takes twice as long when it must expect
    documents as long as all tokens together. Some of the queries over all keys: a layout by `query_runs` (or, for the reference, by
    `query_slice`), and no num_rows.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        return_lse: whether to give the log-sum-exp: `[tokens, H]`, float32, natural logarithm, no gradient. Else None.
        num_rows: says that the documents are exactly this many spans of equal length, which allows the fastest kernel. Believed
            on a GPU, since checking would mean waiting for it; checked on a CPU.
        backend: which fused kernel to use on a GPU: None, "cudnn", "te" or "flash" (fused.py says when each is picked).
        impl: None, "triton" (the fused GPU kernels) or "reference". This operator has no Triton kernel of its own: on CPU tensors
            under Triton's interpreter the reference stands in.

    Raises:
        ValueError: for arguments that do not fit each other, and for what an implementation does not serve (the GPU kernels: bfloat16 and
            float16, D a multiple of 8 up to 128).
    """
    check_attention(q=q, k=k, v=v)
    check_documents(cu_seqlens, q, k)
    check_rows(cu_seqlens, q.shape[0], num_rows)
    check_backend(backend, num_rows)
    scale = check_scale(scale, q.shape[-1])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # Transformer Engine reads no strides
    if resolve_impl(impl, q, "full_attention") == "triton" and q.is_cuda:
        return _FullAttention.apply(
            aligned(q), aligned(k), aligned(v), cu_seqlens, num_rows, backend, scale, return_lse
        )
    return full_attention_reference(q, k, v, cu_seqlens=cu_seqlens, scale=scale, return_lse=return_lse)


class _FullAttention(torch.autograd.Function):
    """Saves q, k, v, o and the library's log-sum-exp; the plan stays on the host."""

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
        grads = fused_backward(aligned(grad_o), q, k, v, o, lse, tuple(states), ends, ctx.plan)
        return *grads, *(None,) * 5


def check_rows(cu_seqlens: torch.Tensor | DocumentLayout, tokens: int, num_rows: object) -> None:
    """Raises ValueError unless num_rows is None or a number of equal rows that the documents may be (on a CPU: are)."""
    if num_rows is None:
        return
    rows = check_whole("num_rows", num_rows, least=1, hint=", or None")
    if tokens % rows:
        raise ValueError(f"num_rows={rows} must divide tokens={tokens}; try None for documents of any length")
    ends = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else cu_seqlens
    if not looks_at_values(ends):
        return
    lengths = (ends[1:] - ends[:-1])[:rows]
    if len(lengths) < rows or (lengths * rows != tokens).any():
        raise ValueError(
            f"num_rows={rows} must say that the documents are equal spans of {tokens} tokens, got {ends.tolist()[:8]}...; try None"
        )
