"""ssa_pretrain/evaluation/heads.py: captured mass and entropy against loops over queries in fp64, and no dependence on the chunks."""

from itertools import pairwise

import pytest
import torch

from ssa_kernels import build_layout, select_blocks
from ssa_pretrain.evaluation import heads
from ssa_pretrain.evaluation.heads import head_sums

H, G, D, BLOCK = 4, 2, 16, 16
ENDS = [0, 37, 38, 111, 160]


def by_loops(q, k, chosen, mask) -> torch.Tensor:
    """Returns the sums over queries, one query and head at a time."""
    sums = torch.zeros(2, H, dtype=torch.float64)
    for first, end in pairwise(ENDS):
        for t in range(first, end):
            for h in range(H):
                logits = k[first : t + 1, h * G // H].double() @ q[t, h].double() * D**-0.5
                p = logits.softmax(0)
                blocks = torch.arange(t + 1 - first) // BLOCK
                row = chosen[t, h * chosen.shape[1] // H]
                inside = torch.isin(blocks, row[row >= 0])
                sums[0, h] += mask[t] * p[inside].sum()
                sums[1, h] -= mask[t] * (p * p.log()).sum()
    return sums


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
@pytest.mark.parametrize("chunk", [1, 7 * H * 160, 2**24])
def test_sums_equal_loops(monkeypatch, score, chunk):
    monkeypatch.setattr(heads, "CHUNK_NUMBERS", chunk)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(160, n, D, generator=generator) * 2 for n in (H, G))
    mask = (torch.rand(160, generator=generator) < 0.8).float()
    layout = build_layout(torch.tensor(ENDS, dtype=torch.int32), num_tokens=160, block_size=BLOCK, max_length=160)
    chosen = select_blocks(q, k, block_size=BLOCK, top_k=2, cu_seqlens=layout, score=score)
    found, wanted = head_sums(q, k, chosen, layout, mask), by_loops(q, k, chosen, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert wanted[0].max() < 0.99 * mask.sum(), "blocks must be left out, or the test proves nothing"
