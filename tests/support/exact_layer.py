"""An SSA layer in float64 on the blocks that the inputs' own precision chooses: near-equal blocks may change places with the precision."""

from ssa_kernels import captured_mass, full_attention, gate_and_align, select_blocks, sparse_attention


def exact_layer(q, k, v, gate, *, layout, top_k, main, score="softmax_sum", weights=(1.0, 1.0)):
    """Returns (inputs in float64 that require gradients, output, alignment loss, captured mass), by the references."""
    block_size = layout.block_size
    indices = select_blocks(q.detach(), k.detach(), block_size=block_size, top_k=top_k, cu_seqlens=layout, score=score)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v, gate)]
    *qkv, logits = inputs
    full, lse_full = full_attention(*qkv, cu_seqlens=layout, impl="reference", return_lse=True)
    sparse, lse = sparse_attention(*qkv, indices, block_size=block_size, cu_seqlens=layout, impl="reference")
    out, loss = gate_and_align(full, sparse, logits, main=main, weights=weights, impl="reference")
    return inputs, out, loss, captured_mass(lse_full, lse).mean()
