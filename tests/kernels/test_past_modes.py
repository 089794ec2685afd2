"""Operators bypass an active torch function mode, which would intercept each of their many small operations. Results are equal."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import ssa_kernels

ENDS = torch.tensor([0, 5, 12])


class RefuseAll(TorchFunctionMode):
    """A mode that refuses every torch operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} went through the mode")


def draw(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


q, k, v, logits = draw(12, 4, 8), draw(12, 2, 8), draw(12, 2, 8), draw(12, 4)
branch_logits = draw(12, 4, 3)
other = q + 1
indices = ssa_kernels.select_blocks(q, k, block_size=2, top_k=2, cu_seqlens=ENDS)
blocks = {"block_size": 2, "cu_seqlens": ENDS}
OPERATORS = {
    "select_blocks": lambda: ssa_kernels.select_blocks(q, k, top_k=2, **blocks),
    "sparse_attention": lambda: ssa_kernels.sparse_attention(q, k, v, indices, **blocks),
    "full_attention": lambda: ssa_kernels.full_attention(q, k, v, cu_seqlens=ENDS, return_lse=True),
    "gate_and_align": lambda: ssa_kernels.gate_and_align(q, other, logits, main="sparse"),
    "ssa_attention": lambda: tuple(ssa_kernels.ssa_attention(q, k, v, logits, top_k=2, main="full", **blocks)),
    "gate": lambda: ssa_kernels.gate(q, logits),
    "gated_sum": lambda: ssa_kernels.gated_sum((q, other, q), branch_logits),
    "window_attention": lambda: ssa_kernels.window_attention(q, k, v, window=3, cu_seqlens=ENDS),
    "compressed_attention": lambda: ssa_kernels.compressed_attention(q, k, v, **blocks),
    "swiglu": lambda: ssa_kernels.swiglu(draws),
    "linear_cross_entropy": lambda: ssa_kernels.linear_cross_entropy(hidden, weight, labels),
    "qkv_rope": lambda: ssa_kernels.qkv_rope(
        mixed, angles, positions, num_kv_heads=2, group_size=2, head_dim=8, num_gates=2
    ),
}
OPERATORS["rope"] = lambda: ssa_kernels.rope(k, angles, positions)
filters = draw(16, 1, 3)
OPERATORS["key_convolution"] = lambda: ssa_kernels.key_convolution(k, filters, positions)
draws, hidden, weight, labels = draw(12, 16), draw(12, 16), draw(20, 16), torch.arange(12)
mixed, angles, positions = draw(12, 2 * (2 * 8 + 8 + 8 + 2)), draw(12, 8), torch.arange(12)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_bypasses_a_mode_with_equal_results(name):
    wanted = OPERATORS[name]()
    with RefuseAll():
        found = OPERATORS[name]()
    for one, same in zip(_tensors(found), _tensors(wanted), strict=True):
        assert torch.equal(one, same)


def _tensors(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def test_mode_is_active_again_afterwards():
    with RefuseAll(), pytest.raises(AssertionError, match="went through the mode"):
        ssa_kernels.swiglu(draws)
        draws.sum()
