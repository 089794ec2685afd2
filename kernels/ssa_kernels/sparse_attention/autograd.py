"""The sparse stream's forward and backward on Triton kernels: which kernels run, and their autograd function.

tensor_core/ serves 16-bit elements on compute capability 8.0 and later, with blocks of 16, 32, 64 or 128 keys, up to 32 heads per list and
up to 256 features per head. portable.py serves everything else. Both directions follow the same steps. The backward's:

    dq and delta, by queries -> index.invert: the queries of each block, in segments -> dk and dv of each segment, in float32, each to a
    place of its own -> segment_sums: the sums of a block's segments, in order

All sums have a fixed order that depends only on the document: gradients are bit-identical from run to run and do not depend on the rest of
the batch. Memory beyond the results, at 65,536 tokens with 32 heads and 2 kv heads of D 64 (N 16, K 16): 336 MB of segment sums, 17 MB of
index, 8 MB of delta; before the sums, 34 MB of tiles while dq runs. The segment sums take max_segments x 2 x K x D x 4 bytes (index.py),
so they grow with the block size and the number of documents: 2.2 GB for K 128 at this shape, 4.8 GB for 8 kv heads of D 128 and K 128,
1.3 GB for documents of one token.

A caller that differentiates more at once (ssa_attention: both streams with their gate) calls `sparse_attention_forward` and
`sparse_attention_backward` itself, and passes the delta that it already has.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned
from ..devices import gpu_of
from ..documents import DocumentLayout
from . import portable
from .index import InvertedIndex, invert_beside, segment_length
from .segment_sums import add_segments


class SparseAttention(torch.autograd.Function):
    """(q, k, v, indices, layout, scale) -> (o, lse). Saves its tensors, o and lse; lse has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, indices, layout, scale):
        o, lse = sparse_attention_forward(q, k, v, indices, layout, scale)
        ctx.save_for_backward(q, k, v, indices, o, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, indices, o, lse = ctx.saved_tensors
        dq, dk, dv = sparse_attention_backward(q, k, v, indices, o, lse, aligned(do), ctx.layout, ctx.scale)
        return dq, dk, dv, None, None, None


def sparse_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); contiguous arguments as in `sparse_attention`, with the layout built."""
    kernels = _kernels(q, indices, layout)
    return kernels.forward(q, k, v, indices, layout, scale)


def sparse_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor,
    do: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    delta: torch.Tensor | None = None,
    index: Callable[[], InvertedIndex] | None = None,
    add_to: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv).

    Args:
        q, k, v, indices, layout, scale: the forward's, all contiguous.
        o, lse: the forward's results. o may be None if delta is given.
        do: [tokens, H, D], the gradient of o, contiguous.
        delta: [tokens, H] float32, sum over d of do * o, if another kernel has computed it (gate_and_align's backward does).
        index: what `invert_beside` returned, if the caller could start it earlier.
        add_to: contiguous gradients of q, k and v, in these tensors' dtype or float32. The results are added to them in float32, in place,
            and they are returned. The first may be None: dq is then a tensor of its own.
    """
    if o is None and delta is None:
        raise ValueError("o=None of sparse_attention_backward needs delta; give one of them")
    has_delta = delta is not None
    if not has_delta:
        delta = torch.empty_like(lse)
    kernels = _kernels(q, indices, layout)
    segment = segment_length(q.shape[1] // indices.shape[1])
    index = index or invert_beside(indices, layout, kv_heads=k.shape[1], segment=segment)
    dq_into, dkdv_into = (None, None) if add_to is None else (add_to[0], add_to[1:])
    dq = kernels.backward_q(q, k, v, indices, o, lse, do, layout, scale, delta, has_delta, dq_into)
    inverted = index()
    sums = kernels.backward_k_v(q, k, v, indices, lse, do, layout, scale, delta, inverted)
    dk, dv = add_segments(sums, inverted, k, layout, scale, dkdv_into)
    return dq, dk, dv


def _kernels(q: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout):
    """Returns the module whose `forward`, `backward_q` and `backward_k_v` serve these tensors."""
    if not runs_on_tensor_cores(q, layout.block_size, q.shape[1] // indices.shape[1]):
        return portable
    from .tensor_core import launch  # imported here because Gluon kernels cannot be defined under the interpreter

    return launch


def runs_on_tensor_cores(q: torch.Tensor, block_size: int, heads_per_list: int) -> bool:
    """Returns whether the tensor-core kernels support these heads and blocks on this device."""
    if not gpu_of(q.device).has_mma_v2:
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and block_size in (16, 32, 64, 128) and heads_per_list <= 32
    return fits and q.dtype in (torch.bfloat16, torch.float16)
