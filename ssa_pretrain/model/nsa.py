"""One attention layer of NSA: three branches, each with a gate of its own, whose gated sum is the layer's output.

Method (arXiv 2502.11089, in the form of the released NSA-1B of arXiv 2511.20102). For each query:

* compressed: attention over the mean keys and mean values of the complete blocks of its document; no learned compression.
* selected: SSA's sparse stream over the chosen blocks. A block's score is its probability in the compressed branch, summed over the group's heads.
* window: attention over the last `attention.window` keys.

All three share the queries, keys and values, which RoPE has rotated. The projection's rows hold three gates per query head, in this order, grouped by
kv head like everything else, so tensor parallelism shards them together.

The layer is `SSAAttention` with the other two branches added to its stream: training computes the sparse stream only. Evaluation also computes the full
stream, in which the selected branch attends to every earlier key, as if every block were chosen. The captured mass and the alignment are those of the
selected branch, since the other two are the same in both streams.

A step of generation runs the same operators, for one query per text over the pages of the cache. It computes the means of all blocks again.

Not done here: a learned compression, decoding kernels.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from ssa_kernels import (
    compressed_attention,
    full_attention,
    gate,
    gated_sum,
    select_blocks,
    sparse_attention,
    window_attention,
)
from ssa_pretrain.model.attention import PackedTokens, SSAAttention

COMPRESSED, SELECTED, WINDOW = 0, 1, 2  # a head's rows of gates


class NSAAttention(SSAAttention):
    """One layer's attention under the method nsa."""

    def _main_stream(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens) -> Tensor:
        """Returns the gated sum of the branches [T, H, D]."""
        a, common = self.attention, {"cu_seqlens": packed.documents, "impl": self.impl}
        compressed, lse = compressed_attention(q, k, v, block_size=a.block_size, **common)
        window, _ = window_attention(q, k, v, window=a.window, **common)
        if packed.main == "full":
            selected, _ = full_attention(q, k, v, num_rows=packed.num_rows, **common)
        else:
            sizes = {"block_size": a.block_size, "top_k": a.top_k}
            indices = select_blocks(q.detach(), k.detach(), **sizes, score=a.score.value, lse=lse, **common)
            selected, _ = sparse_attention(q, k, v, indices, block_size=a.block_size, **common)
        return gated_sum((compressed, selected, window), self._by_branch(q, gate_logits), impl=self.impl)

    def _newest_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated sum of the branches [T, H, D] of the newest tokens of cached texts, 0 for the padding after them."""
        texts = packed.continues
        assert texts is not None and gate_logits is not None
        count = len(texts)
        keys, values = texts.append(self.layer_number, k[:count], v[:count], self.impl)
        newest = replace(packed, documents=texts.newest_queries(), num_rows=None)
        out = self._main_stream(q[:count], keys, values, gate_logits[:count], newest)
        return pad(out, (0, 0, 0, 0, 0, len(q) - count))

    def _both_streams(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor | None, packed: PackedTokens
    ) -> Tensor:
        """Returns the gated sum of the branches [T, H, D]; records alignment and captured mass of the selected one."""
        a, common = self.attention, {"cu_seqlens": packed.documents, "impl": self.impl}
        gates = self._by_branch(q, gate_logits)
        out = super()._both_streams(q, k, v, gates[..., SELECTED], packed)
        compressed, _ = compressed_attention(q, k, v, block_size=a.block_size, **common)
        window, _ = window_attention(q, k, v, window=a.window, **common)
        out = out + gate(compressed, gates[..., COMPRESSED], impl=self.impl)
        return out + gate(window, gates[..., WINDOW], impl=self.impl)

    @staticmethod
    def _by_branch(q: Tensor, gate_logits: Tensor | None) -> Tensor:
        """Returns the gates' logits [T, H, 3]."""
        assert gate_logits is not None  # config/rules/nsa.py
        return gate_logits.view(*q.shape[:2], -1)
