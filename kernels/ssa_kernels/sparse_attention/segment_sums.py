"""dK and dV from the segments' sums (Triton): a block's segments are added in their order.

Every program of the dK/dV kernels writes its segment's sums in float32 to its own place. The order of the additions here depends only
on the document, so gradients are bit-identical from run to run and do not depend on the rest of the batch.
"""

import torch
import triton
import triton.language as tl

from ..documents import DocumentLayout
from ..launch import launch
from .index import InvertedIndex

ELEMENTS_PER_PROGRAM = 512
SEGMENTS_PER_STEP = 8


@triton.jit(do_not_specialize=["num_block_rows"])
def add_segments_kernel(
    sums_ptr, first_segment_ptr, block_start_ptr, block_length_ptr, dk_ptr, dv_ptr, scale, num_block_rows,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    ELEMENTS: tl.constexpr, SEGMENTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ELEMENTS elements of a bucket's dk and dv; ADD: added to the present values. Grid: (buckets, pieces of ELEMENTS)."""
    bucket = tl.program_id(0)
    block_row = bucket % num_block_rows
    length = tl.load(block_length_ptr + block_row)
    if length > 0:
        element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
        segment = tl.load(first_segment_ptr + bucket)
        end = tl.load(first_segment_ptr + bucket + 1)
        acc = tl.zeros([ELEMENTS], tl.float32)
        for first in range(segment, end, SEGMENTS):
            several = first + tl.arange(0, SEGMENTS)
            offsets = several.to(tl.int64)[:, None] * (2 * KEYS * DIM) + element[None, :]
            acc += tl.sum(tl.load(sums_ptr + offsets, mask=(several < end)[:, None], other=0.0), 0)
        key, dim = element // DIM % KEYS, element % DIM
        token = (tl.load(block_start_ptr + block_row) + key).to(tl.int64)
        target = (token * KV_HEADS + bucket // num_block_rows) * HEAD_DIM + dim
        inside = (key < length) & (dim < HEAD_DIM)
        in_dk, in_dv = inside & (element < KEYS * DIM), inside & (element >= KEYS * DIM)
        dk, dv = acc * scale, acc
        if ADD:
            dk += tl.load(dk_ptr + target, mask=in_dk, other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + target, mask=in_dv, other=0.0).to(tl.float32)
        tl.store(dk_ptr + target, dk.to(dk_ptr.dtype.element_ty), mask=in_dk)
        tl.store(dv_ptr + target, dv.to(dv_ptr.dtype.element_ty), mask=in_dv)


def add_segments(
    sums: torch.Tensor,
    index: InvertedIndex,
    k: torch.Tensor,
    layout: DocumentLayout,
    scale: float,
    add_to: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dk, dv) in k's shape and dtype from the sums [segments, 2, padded K, padded D], added to `add_to` if it is given."""
    _, kv_heads, head_dim = k.shape
    keys, dim = sums.shape[2:]
    dk, dv = (torch.empty_like(k), torch.empty_like(k)) if add_to is None else add_to
    elements = min(ELEMENTS_PER_PROGRAM, keys * dim)
    launch(
        add_segments_kernel, (kv_heads * layout.num_block_rows, 2 * keys * dim // elements),
        sums, index.first_segment, layout.block_start, layout.block_length, dk, dv, scale, layout.num_block_rows,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, KEYS=keys, ELEMENTS=elements, SEGMENTS=SEGMENTS_PER_STEP,
        ADD=add_to is not None,
    )  # fmt: skip
    return dk, dv
