"""An attention method: SSA whose sparse stream is a sliding window, the `attention.top_k` newest blocks of the query's document.

    python tests/unit/project/exercises/attention_method.py experiment=quickstart data.path=DIR output_dir=DIR

trains with it. The layer computes a stream in `_stream`, and both of them with the alignment in `_both_streams`; all else is inherited.
"""

import torch
from torch import Tensor

from ssa_kernels import DocumentLayout, captured_mass, gate_and_align, sparse_attention
from ssa_pretrain.model import spec
from ssa_pretrain.model.attention import PackedTokens, SSAAttention
from ssa_pretrain.train import main


def window_blocks(layout: DocumentLayout, num_kv_heads: int, top_k: int) -> Tensor:
    """Returns int32 [T, G, N]: each query's own block and those just before it, ascending, padded with -1."""
    own = layout.query_position // layout.block_size
    blocks = (own - top_k + 1).clamp(min=0)[:, None] + torch.arange(top_k, device=own.device)
    blocks = blocks.masked_fill(blocks > own[:, None], -1)
    return blocks[:, None].expand(-1, num_kv_heads, -1).int().contiguous()


class SlidingWindow(SSAAttention):
    """SSA with a window in place of the selection."""

    def _stream(self, name: str, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, *rows, **options):
        if name == "full":
            return super()._stream(name, q, k, v, layout, *rows, **options)
        indices = window_blocks(layout, k.shape[1], self.attention.top_k)
        block_size = self.attention.block_size
        return sparse_attention(q, k, v, indices, block_size=block_size, cu_seqlens=layout, impl=self.impl)

    def _both_streams(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens):
        full, lse_full = self._stream("full", q, k, v, packed.documents, packed.num_rows, return_lse=True)
        sparse, lse_sparse = self._stream("sparse", q, k, v, packed.documents)
        logits = q.new_full(q.shape[:2], torch.inf) if gate_logits is None else gate_logits
        weights = (self.attention.sparsity_weight, self.attention.commitment_weight)
        out, loss = gate_and_align(full, sparse, logits, main=packed.main, weights=weights, impl=self.impl)
        return self._align(out, loss, captured_mass(lse_full, lse_sparse).mean(), packed)


if __name__ == "__main__":
    spec.SSAAttention = SlidingWindow  # the one place that names a layer's attention
    main()
