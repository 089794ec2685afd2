"""`full_attention`: the public function, its checks, its autograd function and the choice of implementation."""

import torch
from torch.autograd.function import once_differentiable

from ..dispatch import past_modes, resolve_impl
from ..documents import DocumentLayout
from .fused import fused_backward, fused_forward, plan_fused
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
        k, v: `[tokens, G, D]`, G dividing H.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it.
        scale: factor of the logits, default D^-1/2.
        return_lse: whether to give the log-sum-exp: `[tokens, H]`, float32, natural logarithm, no gradient. Else None.
        num_rows: says that the documents are exactly this many spans of equal length, which allows the fastest kernel. Believed
            on a GPU, since checking would mean waiting for it; checked on a CPU.
        backend: which fused kernel to use on a GPU: None, "cudnn", "te" or "flash" (fused.py says when each is picked).
        impl: None, "triton" (the fused GPU kernels) or "reference". This operator has no Triton kernel of its own: on CPU tensors
            under Triton's interpreter the reference stands in.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    check_attention_inputs(q, k, v, num_rows)
    if resolve_impl(impl, q, "full_attention") == "triton" and q.is_cuda:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # Transformer Engine reads no strides
        return _FullAttention.apply(q, k, v, cu_seqlens, num_rows, backend, scale, return_lse)
    _check_rows(cu_seqlens, q.shape[0], num_rows)
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
        grads = fused_backward(grad_o.contiguous(), q, k, v, o, lse, tuple(states), ends, ctx.plan)
        return *grads, *(None,) * 5


def check_attention_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_rows: int | None) -> None:
    """Raises ValueError unless the shapes fit each other and the rows."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [tokens, H, D] and twice [tokens, G, D], "
            "with G dividing H"
        )
    if num_rows is not None and (num_rows < 1 or q.shape[0] % num_rows):
        raise ValueError(f"num_rows={num_rows} must divide tokens={q.shape[0]}; try None for documents of any length")


def _check_rows(cu_seqlens: torch.Tensor | DocumentLayout, tokens: int, num_rows: int | None) -> None:
    ends = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else cu_seqlens
    if num_rows is None or not ends.is_cpu:
        return
    lengths = (ends[1:] - ends[:-1])[:num_rows]
    if len(lengths) < num_rows or (lengths * num_rows != tokens).any():
        raise ValueError(
            f"num_rows={num_rows} must say that the documents are equal spans of {tokens} tokens, got {ends.tolist()[:8]}...; try None"
        )
