"""The sparse stream's forward: which kernel runs, and the portable one (Triton).

The mathematics is in tensor_core_forward.py. The tensor-core kernels serve 16-bit elements on compute capability 8.0 and above, blocks of
16, 32, 64 and 128 keys, up to 32 heads a list and 128 features a head. The portable kernel below computes the same for anything else:
float32, other block sizes, and Triton's interpreter on a CPU, where the tests run it. It is written to be read, with an online softmax
(m the running maximum):

    m' = max(m, max_j s)    l' = l exp(m - m') + sum_j exp(s - m')    acc' = acc exp(m - m') + sum_j exp(s - m') v    o = acc / l

Grid: one program per (query, list). A query without blocks gives o = 0 and lse = -inf.
"""

import torch
import triton
import triton.language as tl

from ..documents import DocumentLayout
from ..launch import launch, next_power_of_2


@triton.jit(do_not_specialize=["num_queries"])
def portable_forward_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, start_ptr, position_ptr, o_ptr, lse_ptr, scale, num_queries,
    LISTS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one query and list."""
    program = tl.program_id(0)
    query, which = program % num_queries, program // num_queries
    entry = query.to(tl.int64) * LISTS + which
    start = tl.load(start_ptr + query)
    position = tl.load(position_ptr + query)
    row = tl.arange(0, ROWS_PADDED)
    dim = tl.arange(0, DIM)
    inside = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    place = (entry * ROWS + row[:, None]) * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0)
    m = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_PADDED], tl.float32)
    acc = tl.zeros([ROWS_PADDED, DIM], tl.float32)
    for slot in range(TOP_K):
        block = tl.load(indices_ptr + entry * TOP_K + slot)
        if (block >= 0) & (block <= position // BLOCK_SIZE):
            key = tl.arange(0, KEYS)
            visible = (key < BLOCK_SIZE) & (block * BLOCK_SIZE + key <= position)
            token = (start + block * BLOCK_SIZE + key).to(tl.int64)
            key_place = (token * KV_HEADS + which // (LISTS // KV_HEADS))[:, None] * HEAD_DIM + dim[None, :]
            key_inside = visible[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + key_place, mask=key_inside, other=0.0)
            v = tl.load(v_ptr + key_place, mask=key_inside, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(visible[None, :], s, float("-inf"))
            higher = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - higher[:, None])
            shrink = tl.exp(m - higher)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + entry * ROWS + row, m + tl.log(total), mask=row < ROWS)


def sparse_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, layout: DocumentLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); contiguous arguments as in `sparse_attention`, with the layout built."""
    if runs_on_tensor_cores(q, layout.block_size, q.shape[1] // indices.shape[1]):
        from .tensor_core import forward  # here: Gluon kernels cannot be defined under the interpreter

        return forward(q, k, v, indices, layout, scale)
    queries, heads, head_dim = q.shape
    lists, top_k = indices.shape[1:]
    o = torch.empty_like(q)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    launch(
        portable_forward_kernel, (queries * lists,),
        q, k, v, indices, layout.query_start, layout.query_position, o, lse, scale, queries,
        LISTS=lists, KV_HEADS=k.shape[1], ROWS=heads // lists, ROWS_PADDED=at_least_16(heads // lists),
        HEAD_DIM=head_dim, DIM=at_least_16(head_dim), BLOCK_SIZE=layout.block_size, KEYS=at_least_16(layout.block_size),
        TOP_K=top_k, num_stages=1,
    )  # fmt: skip
    return o, lse


def runs_on_tensor_cores(q: torch.Tensor, block_size: int, heads_per_list: int) -> bool:
    """Returns whether the tensor-core kernels serve these heads and blocks on this device."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and block_size in (16, 32, 64, 128) and heads_per_list <= 32
    return fits and q.dtype in (torch.bfloat16, torch.float16)


def at_least_16(size: int) -> int:
    """Returns the power of two that holds `size`, at least tl.dot's 16."""
    return max(16, next_power_of_2(size))
