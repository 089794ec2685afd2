"""ssa_pretrain/evaluation/bound.py: Theorem 1's quantities against loops over queries in fp64, independent of the chunks; the bound can be reached."""

from itertools import pairwise

import pytest
import torch

from ssa_kernels import build_layout, select_blocks
from ssa_pretrain.evaluation import bound
from ssa_pretrain.evaluation.bound import SUMS, bound_sums

H, G, D, BLOCK = 4, 2, 16, 16
ENDS = [0, 37, 38, 111, 160]


def by_loops(q, k, v, chosen, mask) -> tuple[torch.Tensor, float, int]:
    """Returns the sums, the largest ratio and the count, one query and head at a time."""
    sums, largest, count = torch.zeros(len(SUMS), dtype=torch.float64), 0.0, 0
    for first, end in pairwise(ENDS):
        for t in range(first, end):
            for h in range(H):
                values = v[first : t + 1, h * G // H].double()
                p = (k[first : t + 1, h * G // H].double() @ q[t, h].double() * D**-0.5).softmax(0)
                row = chosen[t, h * chosen.shape[1] // H]
                inside = torch.isin(torch.arange(t + 1 - first) // BLOCK, row[row >= 0])
                if bool(inside.all()) or not mask[t]:
                    continue
                full, lost = p @ values, float(p[~inside].sum())
                sparse = (p[inside] / p[inside].sum()) @ values[inside]
                gap = float((full - sparse).norm())
                limit = lost * float(values[~inside].norm(dim=1).max() + sparse.norm())
                sums += torch.tensor([gap, limit, lost, full.norm(), sparse.norm(), gap > limit])
                largest, count = max(largest, gap / limit), count + 1
    return sums, largest, count


@pytest.mark.parametrize("score", ["softmax_sum", "per_head"])
@pytest.mark.parametrize("numbers", [14 * H * 160, 2**25])
def test_sums_equal_loops(monkeypatch, score, numbers):
    monkeypatch.setattr(bound, "CHUNK_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(160, n, D, generator=generator) * 2 for n in (H, G, G))
    mask = (torch.rand(160, generator=generator) < 0.8).float()
    layout = build_layout(torch.tensor(ENDS, dtype=torch.int32), num_tokens=160, block_size=BLOCK, max_length=160)
    chosen = select_blocks(q, k, block_size=BLOCK, top_k=2, cu_seqlens=layout, score=score)
    found, largest, count = bound_sums(q, k, v, chosen, layout, mask)
    wanted, highest, number = by_loops(q, k, v, chosen, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert int(count) == number > 100
    assert float(largest) == pytest.approx(highest, rel=1e-4) and highest < 1
    assert found[SUMS.index("violations")] == 0


def test_bound_is_reached_by_opposite_values_and_a_wrong_output_violates_it(monkeypatch):
    """All dropped values equal -a, all chosen ones a: the triangle inequality is an equality."""
    q, k = torch.zeros(48, 1, D), torch.zeros(48, 1, D)
    k[16:32, 0, 0], q[:, 0, 0] = -1.0, 1.0  # block 1 is dropped by the queries of block 2
    v = torch.ones(48, 1, D)
    v[16:32] = -1.0
    layout = build_layout(torch.tensor([0, 48], dtype=torch.int32), num_tokens=48, block_size=BLOCK, max_length=48)
    chosen = torch.tensor([[[0, -1]]] * 16 + [[[0, 1]]] * 16 + [[[0, 2]]] * 16, dtype=torch.int32)
    sums, largest, count = bound_sums(q, k, v, chosen, layout, torch.ones(48))
    assert float(largest) == pytest.approx(1.0, rel=1e-4) and int(count) == 16
    assert sums[SUMS.index("violations")] == 0
    monkeypatch.setattr(bound, "SLACK", -0.9)  # an output that breaks the bound is counted
    assert bound_sums(q, k, v, chosen, layout, torch.ones(48))[0][SUMS.index("violations")] == 16
