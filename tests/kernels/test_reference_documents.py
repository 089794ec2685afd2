"""Document layouts for documents of any length, and the choice of the implementation."""

import pytest
import torch

from ssa_kernels import build_layout
from ssa_kernels.devices import Gpu
from ssa_kernels.dispatch import resolve_impl
from support import oracle


@pytest.mark.parametrize(
    ("cu_seqlens", "tokens"),
    [([0, 1, 16, 16, 32, 49, 49, 110], 125), ([0, 5], 5), ([0, 0, 0], 3), ([0, 1, 2, 3], 3), ([0, 64], 64)],
)
@pytest.mark.parametrize("block_size", [1, 4, 16, 100])
def test_layout_equals_a_direct_count(cu_seqlens, tokens, block_size):
    layout = build_layout(torch.tensor(cu_seqlens, dtype=torch.int32), num_tokens=tokens, block_size=block_size)
    spans = oracle.document_spans(cu_seqlens, tokens)
    blocks, first_rows = [], []
    for start, end in spans:
        first_rows += [len(blocks)] * (end - start)
        blocks += [(first, min(block_size, end - first)) for first in range(start, end, block_size)]
    assert layout.query_start.tolist() == [start for start, end in spans for _ in range(start, end)]
    assert layout.query_position.tolist() == [t - start for start, end in spans for t in range(start, end)]
    assert layout.query_first_block_row.tolist() == first_rows
    used = len(blocks)
    assert used <= layout.num_block_rows <= tokens
    assert list(zip(layout.block_start.tolist(), layout.block_length.tolist(), strict=True))[:used] == blocks
    assert not layout.block_length[used:].any()
    assert all(
        array.dtype == torch.int32 for array in (layout.cu_seqlens, layout.query_first_block_row, layout.block_start)
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_size", [1, 4, 100])
@pytest.mark.parametrize("lengths", [(5, 0, 3, 40), (0,), (1,) * 2500, (0, 1, 2) * 700])
def test_kernels_compute_the_same_arrays(lengths, block_size, dtype):
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported")
    from ssa_kernels.documents import ARRAYS
    from ssa_kernels.documents_triton import layout_arrays

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    apart = torch.stack([cu_seqlens, cu_seqlens + 7], 1)[:, 0]  # a view with a stride
    tokens = max(int(cu_seqlens[-1]) + 3, 1)
    layout = build_layout(cu_seqlens, num_tokens=tokens, block_size=block_size)
    for given in (cu_seqlens, apart):
        arrays = layout_arrays(given, num_tokens=tokens, block_size=block_size, num_block_rows=layout.num_block_rows)
        assert all(torch.equal(arrays[name], getattr(layout, name)) for name in ARRAYS)


def test_kernels_clamp_boundaries_into_order():
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported")
    from ssa_kernels.documents_triton import layout_arrays

    wrong = torch.tensor([3, 9, 4, -(2**40), 2**40, 5])
    arrays = layout_arrays(wrong, num_tokens=20, block_size=4, num_block_rows=11)
    assert arrays["cu_seqlens"].tolist() == [0, 9, 9, 9, 20, 20, 20]
    assert arrays["query_start"].tolist() == [0] * 9 + [9] * 11


def test_implementation_follows_the_device_without_silent_fallback():
    here = torch.zeros(1)
    assert resolve_impl(None, here, "op") == "reference"
    assert resolve_impl("reference", here, "op") == "reference"
    with pytest.raises(ValueError, match="impl='fast' of op"):
        resolve_impl("fast", here, "op")


def test_gpus_that_are_too_old_are_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("ssa_kernels.dispatch.gpu_of", lambda device: Gpu("cuda", 75, 64 * 1024))
    monkeypatch.setattr("ssa_kernels.dispatch._interpreting", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        ValueError,
        match=r"tensors of op are on a Tesla T4 of compute capability 7.5, but the kernels need 8.0 \(A100\)",
    ):
        resolve_impl("triton", torch.zeros(1), "op")
