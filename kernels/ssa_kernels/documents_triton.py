"""The arrays of a layout in two kernels (Triton), where documents.py takes some thirty small operations: 0.02 ms for 0.2 of the host's time.

`document_kernel`, one program: boundaries in order and the block rows before each document, by running sums over chunks of documents.
`token_kernel`, one program per 1,024 tokens or block rows: each finds its document by bisection.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

CHUNK = 1024


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _in_order(cu_seqlens_ptr, stride, boundary, num_boundaries, num_tokens, carry):
    """Returns the boundaries of these numbers, clamped into order: 0 before the first, num_tokens after the last."""
    inside = (boundary > 0) & (boundary < num_boundaries)
    given = tl.load(cu_seqlens_ptr + boundary.to(tl.int64) * stride, mask=inside, other=0)
    given = tl.minimum(tl.maximum(given, 0), num_tokens).to(tl.int32)
    given = tl.where(boundary < num_boundaries, given, num_tokens)
    return tl.maximum(tl.associative_scan(given, 0, _larger), carry)


@triton.jit(do_not_specialize=["num_boundaries", "num_tokens", "block_size"])
def document_kernel(
    cu_seqlens_ptr, stride, ends_ptr, first_block_row_ptr, num_boundaries, num_tokens, block_size, CHUNK: tl.constexpr
):
    """ends and document_first_block_row [num_boundaries + 1]: the given documents, and one more for the tokens past the last boundary."""
    tl.store(ends_ptr, 0)
    tl.store(first_block_row_ptr, 0)
    last = tl.full([], 0, tl.int32)  # the largest boundary so far
    rows = tl.full([], 0, tl.int32)
    for start in range(0, num_boundaries, CHUNK):
        document = start + tl.arange(0, CHUNK)
        begin = _in_order(cu_seqlens_ptr, stride, document, num_boundaries, num_tokens, last)
        end = _in_order(cu_seqlens_ptr, stride, document + 1, num_boundaries, num_tokens, last)
        inside = document < num_boundaries
        blocks = tl.where(inside, (end - begin + (block_size - 1)) // block_size, 0)
        tl.store(ends_ptr + 1 + document, end, mask=inside)
        tl.store(first_block_row_ptr + 1 + document, rows + tl.cumsum(blocks, 0), mask=inside)
        last = tl.max(end, 0)
        rows += tl.sum(blocks, 0)


@triton.jit
def _document_of(ptr, x, documents, steps):
    """Returns the first document d with ptr[d + 1] > x, or the last document."""
    lo = tl.zeros_like(x)
    hi = lo + documents
    for _ in range(steps):
        middle = (lo + hi) // 2
        before = (middle < documents) & (tl.load(ptr + 1 + middle, mask=middle < documents, other=0) <= x)
        lo, hi = tl.where(before, middle + 1, lo), tl.where(before, hi, middle)
    return tl.minimum(lo, documents - 1)


@triton.jit(do_not_specialize=["documents", "steps", "num_tokens", "num_block_rows", "block_size"])
def token_kernel(
    ends_ptr,
    first_block_row_ptr,
    query_start_ptr,
    query_position_ptr,
    query_first_block_row_ptr,
    block_start_ptr,
    block_length_ptr,
    documents,
    steps,
    num_tokens,
    num_block_rows,
    block_size,
    CHUNK: tl.constexpr,
):
    """The arrays by token and by block row. Grid: chunks of tokens, then chunks of block rows."""
    token_chunks = (num_tokens + CHUNK - 1) // CHUNK
    if tl.program_id(0) < token_chunks:
        token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        inside = token < num_tokens
        document = _document_of(ends_ptr, token, documents, steps)
        start = tl.load(ends_ptr + document)
        tl.store(query_start_ptr + token, start, mask=inside)
        tl.store(query_position_ptr + token, token - start, mask=inside)
        tl.store(query_first_block_row_ptr + token, tl.load(first_block_row_ptr + document), mask=inside)
    else:
        row = (tl.program_id(0) - token_chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = row < num_block_rows
        document = _document_of(first_block_row_ptr, row, documents, steps)
        start = tl.load(ends_ptr + document) + (row - tl.load(first_block_row_ptr + document)) * block_size
        length = tl.minimum(tl.maximum(tl.load(ends_ptr + document + 1) - start, 0), block_size)
        tl.store(block_start_ptr + row, tl.minimum(start, num_tokens), mask=inside)
        tl.store(block_length_ptr + row, length, mask=inside)


def layout_arrays(
    cu_seqlens: torch.Tensor, *, num_tokens: int, block_size: int, num_block_rows: int
) -> dict[str, torch.Tensor]:
    """Returns the arrays of `build_layout` by name, for checked arguments."""
    documents = len(cu_seqlens)  # the tokens past the last boundary are one more
    lengths = {
        **dict.fromkeys(("cu_seqlens", "document_first_block_row"), documents + 1),
        **dict.fromkeys(("query_start", "query_position", "query_first_block_row"), num_tokens),
        **dict.fromkeys(("block_start", "block_length"), num_block_rows),
    }
    arrays = _empty(lengths, cu_seqlens.device)
    by_document = arrays["cu_seqlens"], arrays["document_first_block_row"]
    launch(
        document_kernel, (1,),
        cu_seqlens, cu_seqlens.stride(0), *by_document, documents, num_tokens, block_size, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    launch(
        token_kernel, (cdiv(num_tokens, CHUNK) + cdiv(num_block_rows, CHUNK),),
        *arrays.values(), documents, documents.bit_length(), num_tokens, num_block_rows, block_size, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return arrays


def _empty(lengths: dict[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns int32 arrays of these lengths, cut from one allocation at multiples of 16 bytes."""
    pieces = [size for n in lengths.values() for size in (n, -n % 4)]
    return dict(
        zip(lengths, torch.empty(sum(pieces), dtype=torch.int32, device=device).split(pieces)[::2], strict=True)
    )
