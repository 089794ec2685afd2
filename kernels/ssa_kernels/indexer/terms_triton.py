"""The terms of the scorer's loss for a chunk of queries, from the logarithms of both block masses (Triton).

For query t, kv head g, with a[c] the target's mass and p[c] the scorer's, over the blocks c up to t's own:

    loss[t, g]     = sum over c of a[c] (ln a[c] - ln p[c])           0 if t has nothing to choose
    captured[t, g] = sum over the chosen c of a[c]                    1 if t has nothing to choose
    ratio[t, g, c] = log2 (a[c] / p[c])                               NOTHING where a[c] is, or if t has nothing to choose

One warp per row (t, g) reads both masses once and writes the ratio over p. In plain torch the same are some forty operations on tensors of that size.
Sums are in fp32 and in a fixed order.

With one index head per kv head (SINGLE), p comes as the logarithms of sums that still lack lse (mass_triton.py). The row's lse is computed first. So is
what the gradients take from `ratio_sums_kernel` otherwise: the sum over keys of softmax x ratio is then the sum of a over the blocks.
"""

import triton
import triton.language as tl

from .mass_triton import NOTHING

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_query", "stride_list"])
def terms_kernel(
    target_ptr,
    predicted_ptr,
    position_ptr,
    indices_ptr,
    loss_ptr,
    captured_ptr,
    lse_ptr,
    sums_ptr,
    first_query,
    stride_list,
    LISTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """loss, captured [T, G] of the chunk's rows from the logarithms target, predicted [n, G, stride_list]; predicted becomes the ratio.

    indices [T, G, TOP_K]: the scorer's choice. SINGLE: also writes lse, in log2, and the sums [T, G] that the gradients take. Columns past a query's own block are neither read nor written. Grid: (queries x kv heads).
    """
    row = tl.program_id(0).to(tl.int64)
    at = first_query.to(tl.int64) * LISTS + row
    own = tl.load(position_ptr + first_query + tl.program_id(0) // LISTS) // BLOCK_SIZE
    end = tl.minimum(own + 1, stride_list)  # a document may exceed max_length
    free = own >= TOP_K
    c = tl.arange(0, WIDTH)
    target, predicted = target_ptr + row * stride_list, predicted_ptr + row * stride_list
    s = tl.arange(0, PADDED_TOP_K)
    chosen = tl.load(indices_ptr + at * TOP_K + s, mask=(s < TOP_K) & free, other=-1)
    found = tl.load(target + chosen, mask=(chosen >= 0) & (chosen < end), other=NOTHING)
    total = tl.zeros([WIDTH], tl.float32)
    attended = tl.zeros([WIDTH], tl.float32)
    lse = 0.0
    if SINGLE:
        top = tl.full([WIDTH], NOTHING, tl.float32)
        for start in range(0, end, WIDTH):
            top = tl.maximum(top, tl.load(predicted + start + c, mask=(start + c < end) & free, other=NOTHING))
        highest = tl.max(top, 0)
        for start in range(0, end, WIDTH):
            x = tl.load(predicted + start + c, mask=(start + c < end) & free, other=NOTHING)
            attended += tl.exp2((x - highest) * LOG2E)
        lse = highest + tl.log2(tl.sum(attended, 0)) / LOG2E
        attended = tl.zeros([WIDTH], tl.float32)
    for start in range(0, end, WIDTH):
        inside = start + c < end
        a = tl.load(target + start + c, mask=inside & free, other=NOTHING)
        difference = a - (tl.load(predicted + start + c, mask=inside & free, other=0.0) - lse)
        mass = tl.exp2(a * LOG2E)
        attended += mass
        total += tl.where(mass > 0, mass * difference, 0.0)
        ratio = tl.where(a > NOTHING / 10, difference * LOG2E, NOTHING)
        tl.store(predicted + start + c, ratio, mask=inside)
    tl.store(loss_ptr + at, tl.sum(total, 0))
    if SINGLE:
        tl.store(lse_ptr + at, tl.where(free, lse * LOG2E, -NOTHING))
        tl.store(sums_ptr + at, tl.sum(attended, 0))
    tl.store(captured_ptr + at, tl.where(free, tl.sum(tl.exp2(found * LOG2E), 0), 1.0))
