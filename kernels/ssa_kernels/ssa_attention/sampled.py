"""One layer of SSA's attention as one autograd function on a GPU: the main stream of all queries, the other stream of a sample.

Beside what it shares with autograd.py (deltas handed over, gradients added in place, the index built beside other work), it writes the
sampled queries' gradients over or into those of all queries, span by span. Differentiating slices one by one would fill a tensor of all
queries with zeros for each of them.
Saved for the backward: q, k, v, the logits, the main stream's output and log-sum-exp, the sample's other output and log-sum-exp, and the
chosen blocks. The sample's part of q, of the main stream and of the logits is copied again.
"""

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned
from ..full_attention.fused import fused_backward, fused_forward, plan_fused
from ..gate_and_align.triton import gate_backward, gate_forward
from ..gate_triton import gate_stream_backward, gate_stream_forward
from ..sparse_attention.api import check_indices
from ..sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
from ..sparse_attention.index import invert_beside, segment_length


class SampledStreams(torch.autograd.Function):
    """(q, k, v, gate_logits, main, weights, layout, sample, selection, scale, num_rows) -> (out, alignment loss, captured mass)."""

    @staticmethod
    def forward(ctx, q, k, v, gate_logits, main, weights, layout, sample, selection, scale, num_rows):
        """Computes the main stream of all queries and the other stream of the sample; the tensors are contiguous."""
        q_sample = sample.take(q)
        full = (q, layout, num_rows) if main == "full" else (q_sample, sample.layout, None)
        sparse = (q, layout) if main == "sparse" else (q_sample, sample.layout)
        q_full, full_layout, rows = full
        plan, ends = plan_fused(q_full, k, full_layout, num_rows=rows, backend=None, scale=scale)
        o_full, lse_full, *states = fused_forward(q_full, k, v, ends, plan)
        indices = aligned(selection.choose(sparse[0], k, sparse[1], scale=scale, impl="triton"))
        check_indices(indices, sparse[0], k, sparse[1])
        o_sparse, lse_sparse = sparse_attention_forward(sparse[0], k, v, indices, sparse[1], scale)
        if main == "full":
            out = gate_stream_forward(o_full, gate_logits)
            streams = sample.take(o_full), o_sparse
            lses = sample.take(lse_full.reshape(q.shape[:2]))[None], lse_sparse
        else:
            out = gate_stream_forward(o_sparse, gate_logits)
            streams, lses = (o_full, sample.take(o_sparse)), (lse_full, sample.take(lse_sparse))
        _, loss, mass = gate_forward(*streams, sample.take(gate_logits), main, weights, lses)
        ctx.save_for_backward(q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, *states)
        ctx.main, ctx.weights, ctx.layout, ctx.sample, ctx.plan, ctx.scale = main, weights, layout, sample, plan, scale
        ctx.mark_non_differentiable(mass)
        return out, loss, mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_loss, _):
        """Differentiates the gate of all queries, gate and alignment of the sample, then both streams, and adds the gradients."""
        q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, *states = ctx.saved_tensors
        layout, sample, full_is_main = ctx.layout, ctx.sample, ctx.main == "full"
        sparse_layout = sample.layout if full_is_main else layout
        segment = segment_length(q.shape[1] // indices.shape[1])
        index = invert_beside(indices, sparse_layout, kv_heads=k.shape[1], segment=segment)
        grad_out, q_sample = grad_out.contiguous(), sample.take(q)

        o = o_full if full_is_main else o_sparse
        do, grad_logits, delta = gate_stream_backward(o, gate_logits, grad_out, with_delta=not full_is_main)
        streams = (sample.take(o), o_sparse) if full_is_main else (o_full, sample.take(o))
        do_full, do_sparse, _, delta_sparse, sample_logits = gate_backward(
            *streams, sample.take(gate_logits), sample.take(grad_out), grad_loss, ctx.main, ctx.weights
        )
        sample.write(grad_logits, sample_logits)
        sample.write(do, do_full if full_is_main else do_sparse)
        if full_is_main:
            q_full, q_sparse, do_full = q, q_sample, do
        else:
            assert delta is not None  # with_delta is set
            sample.write(delta, delta_sparse)
            q_full, q_sparse, do_sparse, delta_sparse = q_sample, q, do, delta

        dq_full, dk, dv = fused_backward(do_full, q_full, k, v, o_full, lse_full, tuple(states), ends, ctx.plan)
        dq_sparse, dk, dv = sparse_attention_backward(
            q_sparse, k, v, indices, None, lse_sparse, do_sparse, sparse_layout, ctx.scale,
            delta=delta_sparse, index=index, add_to=(None, dk.contiguous(), dv.contiguous()),
        )  # fmt: skip
        dq, dq_sample = (dq_full.contiguous(), dq_sparse) if full_is_main else (dq_sparse, dq_full)
        sample.add(dq, dq_sample)
        return dq, dk.to(k.dtype), dv.to(v.dtype), grad_logits, *(None,) * 7
