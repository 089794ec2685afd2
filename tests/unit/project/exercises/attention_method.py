"""An attention method: SSA whose sparse stream is a sliding window, the `attention.top_k` newest blocks of the query's document.

    python tests/unit/project/exercises/attention_method.py experiment=quickstart data.path=DIR output_dir=DIR

trains with it. The layer takes its blocks from `select`; all else is inherited.
"""

import torch
from torch import Tensor

from ssa_kernels import DocumentLayout
from ssa_pretrain.config import Method
from ssa_pretrain.model import spec
from ssa_pretrain.model.attention import SSAAttention
from ssa_pretrain.train import main


class SlidingWindow(SSAAttention):
    """SSA with a window in place of the selection."""

    def select(self, q: Tensor, k: Tensor, layout: DocumentLayout) -> Tensor:
        """Returns each query's own block and those just before it, ascending, padded with -1."""
        own, top_k = layout.query_position // layout.block_size, self.attention.top_k
        blocks = (own - top_k + 1).clamp(min=0)[:, None] + torch.arange(top_k, device=own.device)
        blocks = blocks.masked_fill(blocks > own[:, None], -1)
        return blocks[:, None].expand(-1, k.shape[1], -1).int()


if __name__ == "__main__":
    spec.ATTENTION[Method.ssa] = SlidingWindow
    main()
