"""Where packed documents and their blocks lie, as device arrays that every kernel of a microbatch shares.

Documents are packed one after another along the token axis; `cu_seqlens` holds their boundaries. Blocks belong to documents:
each document starts a block of its own, and its last block may be short. Numbering the blocks of all documents in one go gives
*block rows*: document d owns the rows from `document_first_row[d]`, and its block b is row `document_first_row[d] + b`.

Everything is computed on the device from `cu_seqlens` by a dozen small operations, without waiting for the device: sizes come
from shapes alone. There are at most T // K + (number of documents) block rows, since a document of length l has
ceil(l / K) <= l // K + 1 blocks; rows past the last document's have length 0. Build a layout once a microbatch and pass it to
every layer in place of `cu_seqlens`.

A query's document and position are read from per-query arrays, never from its place in the batch. Hence `query_slice`: a rank
that holds a part of the queries, or a decoding step with one, uses the same kernels over the same keys. `query_runs` does it for
runs of neighbouring queries, which is what a context-parallel rank holds, and notes them for the kernels that need to know: the
libraries' full attention, and selection, whose tiles of queries must not reach from one run into the next.

Not done here: nothing is checked on CUDA, where it would mean waiting. Boundaries past the tokens are cut off, and tokens past
the last boundary form one more document, so that no kernel can leave its tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Neighbouring queries, and the keys up to the last of them, by documents: one call of attention on packed documents.

    Document d has the queries [cu_seqlens_q[d], cu_seqlens_q[d + 1]) of the run and the keys [cu_seqlens_k[d], cu_seqlens_k[d + 1]) of
    the sequence. Its queries are the last of its keys, so a causal mask aligned at the bottom right is exact. Documents before the run
    have keys and no queries, those after it neither.
    """

    first: int  # key of the first query
    length: int
    cu_seqlens_q: torch.Tensor  # int32 [documents + 1], ending with length
    cu_seqlens_k: torch.Tensor  # int32 [documents + 1], ending with end

    @property
    def end(self) -> int:
        """The key after the last query's: what the run's queries can see lies before it."""
        return self.first + self.length


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """Documents and blocks of one packed sequence. All arrays are int32 and lie on one device."""

    cu_seqlens: torch.Tensor  # [documents + 1] first token of each document, ending with num_tokens
    document_first_row: (
        torch.Tensor
    )  # [documents + 1] block row of each document's block 0, ending with the rows in use
    query_start: torch.Tensor  # [T] first token of the query's document
    query_position: torch.Tensor  # [T] place of the query in its document; its own key is query_start + query_position
    query_first_row: torch.Tensor  # [T] block row of the first block of the query's document
    block_start: torch.Tensor  # [R] first token of each block row
    block_length: torch.Tensor  # [R] tokens in it, 0 in unused rows
    block_size: int
    num_tokens: int  # keys; as many queries as query_position has entries
    max_length: int  # no document is longer (bounds workspaces and loops; num_tokens where nothing better is known)
    runs: tuple[QueryRun, ...] = ()  # where the queries are runs of neighbours (`query_runs`), in order
    scattered: bool = False  # queries may lie far apart, so that neighbours in the batch are none in the sequence

    @property
    def num_block_rows(self) -> int:
        """R, the bound on all documents' blocks."""
        return self.block_start.shape[0]

    @property
    def max_blocks(self) -> int:
        """The most blocks that a document can have."""
        return -(-self.max_length // self.block_size)


def build_layout(
    cu_seqlens: torch.Tensor, *, num_tokens: int, block_size: int, max_length: int | None = None
) -> DocumentLayout:
    """Returns the layout of documents with boundaries `cu_seqlens`.

    Args:
        cu_seqlens: int32 or int64 `[documents + 1]`, starting with 0, non-decreasing; repeated entries are empty documents.
        num_tokens: length of the token axis.
        block_size: keys per block.
        max_length: bound on a document's length, if one is known on the host (the row length where rows are packed).

    Raises:
        ValueError: for a wrong shape or, on the CPU, wrong boundaries.
    """
    _check_boundaries(cu_seqlens, num_tokens, block_size)
    max_length = num_tokens if max_length is None else min(max_length, num_tokens)
    device = cu_seqlens.device
    ends = torch.cat([cu_seqlens.to(torch.int32), cu_seqlens.new_full((1,), num_tokens, dtype=torch.int32)])
    ends = ends.clamp(max=num_tokens)
    lengths = ends[1:] - ends[:-1]
    first_row = torch.zeros_like(ends)
    first_row[1:] = torch.cumsum((lengths + (block_size - 1)) // block_size, 0, dtype=torch.int32)

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    document = torch.searchsorted(ends[1:], token, right=True).clamp(max=len(lengths) - 1)
    start = ends[document]

    row = torch.arange(min(num_tokens, num_tokens // block_size + len(lengths)), dtype=torch.int32, device=device)
    row_document = torch.searchsorted(first_row[1:], row, right=True).clamp(max=len(lengths) - 1)
    block_start = ends[row_document] + (row - first_row[row_document]) * block_size
    block_length = (ends[row_document + 1] - block_start).clamp(0, block_size)
    return DocumentLayout(
        cu_seqlens=ends,
        document_first_row=first_row,
        query_start=start,
        query_position=token - start,
        query_first_row=first_row[document],
        block_start=block_start.clamp(max=num_tokens),
        block_length=block_length,
        block_size=block_size,
        num_tokens=num_tokens,
        max_length=max_length,
    )


def query_slice(layout: DocumentLayout, queries: slice | torch.Tensor) -> DocumentLayout:
    """Returns the layout for a part of the queries (a slice, or their ascending int64 numbers) over all the keys.

    Of a layout by `query_runs` a slice may reach from one run into the next, so its queries count as lying apart.

    Neighbours cost least, and runs of neighbours have `query_runs`: selection in Triton takes 128 / G queries of the batch as one tile, which
    walks all block rows from the first one's document to the last one's.
    """
    together = isinstance(queries, slice) and queries.step in (None, 1) and len(layout.runs) < 2
    return replace(
        layout,
        query_start=layout.query_start[queries],
        query_position=layout.query_position[queries],
        query_first_row=layout.query_first_row[queries],
        runs=(),
        scattered=layout.scattered or not together,
    )


def query_runs(layout: DocumentLayout, spans: Sequence[tuple[int, int]]) -> DocumentLayout:
    """Returns the layout for runs of neighbouring queries over all the keys, from the layout of all queries.

    Args:
        layout: of as many queries as keys.
        spans: (first query, number of queries) of each run, ascending, apart from each other.

    Raises:
        ValueError: for runs that overlap, are empty or leave the tokens, or a layout of some queries only.
    """
    edges = [0, *(edge for first, length in spans for edge in (first, first + length)), layout.num_tokens]
    if not spans or min(length for _, length in spans) < 1 or edges != sorted(edges):
        raise ValueError(
            f"spans={list(spans)} must be (first, length) of runs that ascend within {layout.num_tokens} tokens and do not overlap"
        )
    if layout.query_position.shape[0] != layout.num_tokens:
        raise ValueError(
            f"layout of {layout.query_position.shape[0]} queries must have all {layout.num_tokens}; take runs of build_layout's"
        )
    runs = []
    for first, length in spans:
        seen = layout.cu_seqlens.clamp(max=first + length)
        runs.append(QueryRun(first, length, (seen - first).clamp(min=0), seen))

    def chosen(array: torch.Tensor) -> torch.Tensor:
        return torch.cat([array[first : first + length] for first, length in spans])

    return replace(
        layout,
        query_start=chosen(layout.query_start),
        query_position=chosen(layout.query_position),
        query_first_row=chosen(layout.query_first_row),
        runs=tuple(runs),
    )


def as_layout(cu_seqlens: torch.Tensor | DocumentLayout, *, num_tokens: int, block_size: int) -> DocumentLayout:
    """Returns `cu_seqlens` if it is a layout already (checked against the sizes), else the layout built from it."""
    if not isinstance(cu_seqlens, DocumentLayout):
        return build_layout(cu_seqlens, num_tokens=num_tokens, block_size=block_size)
    if cu_seqlens.block_size != block_size:
        raise ValueError(
            f"block_size={block_size} must equal the layout's {cu_seqlens.block_size}; build another layout"
        )
    if cu_seqlens.num_tokens != num_tokens:
        raise ValueError(f"num_tokens={num_tokens} of the keys must equal the layout's {cu_seqlens.num_tokens}")
    return cu_seqlens


def layout_to(layout: DocumentLayout, device: torch.device | str) -> DocumentLayout:
    """Returns the layout with its arrays on `device`."""
    arrays = {f.name: getattr(layout, f.name) for f in fields(layout)}
    moved = {name: value.to(device) for name, value in arrays.items() if isinstance(value, torch.Tensor)}
    runs = tuple(
        replace(run, cu_seqlens_q=run.cu_seqlens_q.to(device), cu_seqlens_k=run.cu_seqlens_k.to(device))
        for run in layout.runs
    )
    return replace(layout, **moved, runs=runs)


def _check_boundaries(cu_seqlens: torch.Tensor, num_tokens: int, block_size: int) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype} must be int32 [documents + 1]; "
            f"try torch.tensor([0, {num_tokens}], dtype=torch.int32) for one document"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1; try 16")
    if not 0 < num_tokens < 2**31:
        raise ValueError(f"num_tokens={num_tokens} must lie in [1, 2^31)")
    if cu_seqlens.device.type == "cpu":
        steps = cu_seqlens[1:] - cu_seqlens[:-1]
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > num_tokens or bool((steps < 0).any()):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()[:8]}... must start with 0, never fall and end at most at num_tokens={num_tokens}"
            )
