"""One layer of SSA's attention as one autograd function on a GPU: the main stream of all queries, the other stream of a sample.

It shares with autograd.py that deltas are handed over, gradients are added in place, and the inverted index is built beside other work. Gate,
alignment and their gradients read and write the sampled rows where they lie (gate_and_align/sampled.py); only q is copied for the sample, and
its gradient added span by span.
Saved for the backward: q, k, v, the logits, the main stream's output and log-sum-exp, those of the sample's other stream, and the chosen
blocks.
"""

from typing import TypeVar

from torch.autograd.function import Function, once_differentiable

from ..checks import aligned
from ..full_attention.fused import fused_backward, fused_forward, plan_fused
from ..gate_and_align.sampled import sampled_backward, sampled_forward
from ..sparse_attention.api import check_indices
from ..sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
from ..sparse_attention.index import invert_beside, segment_length

T = TypeVar("T")


class SampledStreams(Function):
    """(q, k, v, gate_logits, main, weights, layout, sample, selection, scale, num_rows) -> (out, alignment loss, captured mass)."""

    @staticmethod
    def forward(ctx, q, k, v, gate_logits, main, weights, layout, sample, selection, scale, num_rows):
        """Computes the main stream of all queries and the other stream of the sample; the tensors are contiguous."""
        q_sample = sample.take(q)
        (q_full, full_layout), (q_sparse, sparse_layout) = _streams(main, (q, layout), (q_sample, sample.layout))
        rows = num_rows if main == "full" else None
        plan, ends = plan_fused(q_full, k, full_layout, num_rows=rows, backend=None, scale=scale)
        o_full, lse_full, *states = fused_forward(q_full, k, v, ends, plan)
        indices = aligned(selection.choose(q_sparse, k, sparse_layout, scale=scale, impl="triton"))
        check_indices(indices, q_sparse, k, sparse_layout)
        o_sparse, lse_sparse = sparse_attention_forward(q_sparse, k, v, indices, sparse_layout, scale)
        o_main, o_other = _streams(main, o_full, o_sparse)
        lse_main, lse_other = (lse_full, lse_sparse) if main == "full" else (lse_sparse[None], lse_full[0])
        out, loss, mass = sampled_forward(
            o_main, o_other, gate_logits, sample.places, main, weights, lse_main, lse_other
        )
        ctx.save_for_backward(q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, *states)
        ctx.main, ctx.weights, ctx.layout, ctx.sample, ctx.plan, ctx.scale = main, weights, layout, sample, plan, scale
        ctx.mark_non_differentiable(mass)
        return out, loss, mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_loss, _):
        """Differentiates gate and alignment, then both streams, and adds the streams' gradients."""
        q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, *states = ctx.saved_tensors
        main, sample = ctx.main, ctx.sample
        q_sample = sample.take(q)
        q_full, q_sparse = _streams(main, q, q_sample)
        _, sparse_layout = _streams(main, ctx.layout, sample.layout)
        segment = segment_length(q.shape[1] // indices.shape[1])
        index = invert_beside(indices, sparse_layout, kv_heads=k.shape[1], segment=segment)
        do_main, do_other, delta_main, delta_other, grad_logits = sampled_backward(
            *_streams(main, o_full, o_sparse),
            gate_logits,
            sample.places,
            grad_out.contiguous(),
            grad_loss,
            main,
            ctx.weights,
        )
        do_full, do_sparse = _streams(main, do_main, do_other)
        _, delta_sparse = _streams(main, delta_main, delta_other)
        dq_full, dk, dv = fused_backward(do_full, q_full, k, v, o_full, lse_full, tuple(states), ends, ctx.plan)
        dq_sparse, dk, dv = sparse_attention_backward(
            q_sparse, k, v, indices, None, lse_sparse, do_sparse, sparse_layout, ctx.scale,
            delta=delta_sparse, index=index, add_to=(None, dk.contiguous(), dv.contiguous()),
        )  # fmt: skip
        dq, dq_sample = _streams(main, dq_full.contiguous(), dq_sparse)
        sample.add(dq, dq_sample)
        return dq, dk.to(k.dtype), dv.to(v.dtype), grad_logits, *(None,) * 7


def _streams(main: str, first: T, second: T) -> tuple[T, T]:
    """Returns (main, other) as (full, sparse), and (full, sparse) as (main, other)."""
    return (first, second) if main == "full" else (second, first)
