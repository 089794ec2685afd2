"""Gradients of keys and values from those of their copies for each span (Triton): one program adds all copies of its keys, in order."""

import torch
import triton
import triton.language as tl

from ..documents import SpanSegments
from ..launch import cdiv, launch, next_power_of_2

ELEMENTS_PER_PROGRAM = 1024


@triton.jit(do_not_specialize=["num_elements"])
def span_sums_kernel(
    dk_copies_ptr, dv_copies_ptr, ranges_ptr, dk_ptr, dv_ptr, num_elements,
    WIDTH: tl.constexpr, SPANS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """ELEMENTS elements of dk and dv, WIDTH of them per key. ranges: each span's (first key, end, place of its first copy)."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    key = element // WIDTH
    dk = tl.zeros([ELEMENTS], tl.float32)
    dv = tl.zeros([ELEMENTS], tl.float32)
    for span in tl.static_range(SPANS):
        first = tl.load(ranges_ptr + 3 * span)
        end = tl.load(ranges_ptr + 3 * span + 1)
        place = tl.load(ranges_ptr + 3 * span + 2).to(tl.int64)
        copied = (key >= first) & (key < end)
        offsets = element + (place - first) * WIDTH
        dk += tl.load(dk_copies_ptr + offsets, mask=copied, other=0.0).to(tl.float32)
        dv += tl.load(dv_copies_ptr + offsets, mask=copied, other=0.0).to(tl.float32)
    inside = element < num_elements
    tl.store(dk_ptr + element, dk, mask=inside)
    tl.store(dv_ptr + element, dv, mask=inside)


def sum_over_spans(
    dk_copies: torch.Tensor, dv_copies: torch.Tensor, k: torch.Tensor, segments: SpanSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dk and dv [keys, G, D] in float32, from the contiguous gradients of the copies that `segments` describes."""
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    launch(
        span_sums_kernel, (cdiv(k.numel(), ELEMENTS_PER_PROGRAM),),
        dk_copies, dv_copies, segments.ranges, dk, dv, k.numel(),
        WIDTH=k.shape[1] * k.shape[2], SPANS=next_power_of_2(len(segments.key_ranges)), ELEMENTS=ELEMENTS_PER_PROGRAM,
    )  # fmt: skip
    return dk, dv
