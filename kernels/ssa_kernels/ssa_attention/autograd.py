"""One layer of SSA's attention as one autograd function on a GPU.

What it saves over the same operators one after another:
- The fused backward of gate and alignment passes rowsum(dO * O) of the sparse stream to the sparse backward, which then needs no pass over
  O and dO of its own. (torch's full attention accepts none from outside.)
- The gate's forward also computes the captured mass, from the full stream's log-sum-exp in the library's layout, without transposing.
- The sparse stream's kernels add their gradients to the full stream's in place.
- The inverted index is built beside the gate's and the full stream's backward.
Saved for the backward: q, k, v, both outputs, both log-sum-exps, the chosen blocks, the logits.
"""

import torch
from torch.autograd.function import once_differentiable

from ..checks import aligned
from ..full_attention.fused import fused_backward, fused_forward, plan_fused
from ..gate_and_align.triton import gate_backward, gate_forward
from ..sparse_attention.api import check_indices
from ..sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
from ..sparse_attention.index import invert_beside, segment_length


class SSAAttention(torch.autograd.Function):
    """(q, k, v, gate_logits, main, weights, layout, selection, scale, num_rows) -> (out, alignment loss, captured mass)."""

    @staticmethod
    def forward(ctx, q, k, v, gate_logits, main, weights, layout, selection, scale, num_rows):
        """Computes both streams and the gate; q, k, v and the logits are contiguous."""
        plan, ends = plan_fused(q, k, layout, num_rows=num_rows, backend=None, scale=scale)
        o_full, lse_full, *states = fused_forward(q, k, v, ends, plan)
        indices = selection.choose(q, k, layout, scale=scale, impl="triton")
        check_indices(indices, q, k, layout)
        indices = aligned(indices)
        o_sparse, lse_sparse = sparse_attention_forward(q, k, v, indices, layout, scale)
        out, loss, mass = gate_forward(o_full, o_sparse, gate_logits, main, weights, (lse_full, lse_sparse))
        on_device = isinstance(main, torch.Tensor)
        ctx.save_for_backward(
            q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, main if on_device else None, *states
        )  # fmt: skip
        ctx.main_name, ctx.weights = None if on_device else main, weights
        ctx.plan, ctx.layout, ctx.scale = plan, layout, scale
        ctx.mark_non_differentiable(mass)
        return out, loss, mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_loss, _):
        """Differentiates the gate, then both streams, and adds the streams' gradients."""
        q, k, v, gate_logits, o_full, lse_full, o_sparse, lse_sparse, indices, ends, main, *states = ctx.saved_tensors
        main = ctx.main_name if main is None else main
        kv_heads, segment = k.shape[1], segment_length(q.shape[1] // indices.shape[1])
        index = invert_beside(indices, ctx.layout, kv_heads=kv_heads, segment=segment)
        do_full, do_sparse, _, delta_sparse, grad_logits = gate_backward(
            o_full, o_sparse, gate_logits, grad_out.contiguous(), grad_loss, main, ctx.weights
        )
        dq, dk, dv = fused_backward(do_full, q, k, v, o_full, lse_full, tuple(states), ends, ctx.plan)
        del do_full  # freed before the sparse backward allocates its workspace
        grads = sparse_attention_backward(
            q, k, v, indices, None, lse_sparse, do_sparse, ctx.layout, ctx.scale,
            delta=delta_sparse, index=index, add_to=(dq.contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()),
        )  # fmt: skip
        return *grads, grad_logits, *(None,) * 6
