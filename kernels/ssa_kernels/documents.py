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

Boundaries are checked on a CPU. On CUDA that would mean waiting, so they are put in order instead: the first counts as 0, each is at
least the one before it and at most num_tokens. Tokens past the last boundary form one more document on either. So no kernel can leave its
tensors. A `max_length` below a document's is refused on a CPU; on CUDA the caller answers for it: results of that batch are then
undefined, still without leaving a tensor.

A layout checks its own arrays when it is made (and makes them contiguous), so that operators need only compare sizes with it. Make one by
`build_layout`, `query_slice` and `query_runs` only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from .checks import INTEGERS, check_tensors, check_whole, looks_at_values

INT32_MAX = 2**31 - 1


QUERY_ARRAYS = ("query_start", "query_position", "query_first_row")
ARRAYS = ("cu_seqlens", "document_first_row", *QUERY_ARRAYS, "block_start", "block_length")


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
    """Documents and blocks of one packed sequence. All arrays are int32, contiguous and lie on one device.

    Raises:
        ValueError: for arrays that do not fit each other, the block size or the number of tokens.
    """

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

    def __post_init__(self) -> None:
        _check_layout(self)
        for name in QUERY_ARRAYS:
            if not getattr(self, name).is_contiguous():
                object.__setattr__(self, "scattered", True)
        for name in ARRAYS:
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @property
    def num_queries(self) -> int:
        """The queries that the layout is of, some or all of its tokens."""
        return self.query_position.shape[0]

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
        num_tokens: length of the token axis, in [1, 2^31).
        block_size: keys per block.
        max_length: bound on a document's length, if one is known on the host (the row length where rows are packed). The tokens past the
            last boundary are a document, too.

    Raises:
        ValueError: for a wrong type, dtype or shape, or, on the CPU, wrong boundaries or a document longer than max_length.
    """
    num_tokens = check_whole("num_tokens", num_tokens, least=1)
    block_size = check_whole("block_size", block_size, least=1, hint=": keys per block; try 16")
    if max_length is not None:
        max_length = check_whole("max_length", max_length, least=1, hint=", or None")
    if max(num_tokens, block_size) > INT32_MAX:
        raise ValueError(f"num_tokens={num_tokens} and block_size={block_size} must lie below 2^31")
    check_boundaries(cu_seqlens, num_tokens)
    max_length = num_tokens if max_length is None else min(max_length, num_tokens)
    device = cu_seqlens.device
    ends = document_ends(cu_seqlens, num_tokens)
    lengths = ends[1:] - ends[:-1]
    if looks_at_values(lengths) and (longest := int(lengths.max())) > max_length:
        raise ValueError(
            f"max_length={max_length} must be at least the longest document's {longest} tokens; try None, or {longest}"
        )
    first_row = torch.zeros_like(ends)
    first_row[1:] = torch.cumsum((lengths + (block_size - 1)) // block_size, 0, dtype=torch.int32)

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    document = torch.searchsorted(ends[1:], token, right=True).clamp(max=len(lengths) - 1)
    start = ends[document]

    row = torch.arange(_row_bound(num_tokens, block_size, len(lengths)), dtype=torch.int32, device=device)
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


def document_ends(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns int32 boundaries in order, from 0 to num_tokens: tokens past the last boundary form one more document."""
    first = cu_seqlens.new_zeros(1, dtype=torch.int32)
    inner = cu_seqlens[1:].clamp(0, num_tokens).to(torch.int32)
    ends = torch.cat([first, inner, first.new_full((1,), num_tokens)])
    return ends if ends.is_cpu else ends.cummax(0).values  # on a CPU they have been checked


def query_slice(layout: DocumentLayout, queries: slice | torch.Tensor) -> DocumentLayout:
    """Returns the layout for a part of the queries (a slice, or their ascending numbers) over all the keys.

    Of a layout by `query_runs` a slice may reach from one run into the next, so its queries count as lying apart.

    Neighbours cost least, and runs of neighbours have `query_runs`: selection in Triton takes 128 / G queries of the batch as one tile, which
    walks all block rows from the first one's document to the last one's.

    Args:
        layout: of the queries to choose from.
        queries: at least one: a slice, or int64 or int32 `[n]` on the layout's device, ascending, in [0, queries of the layout) (checked on
            a CPU only; on CUDA the caller answers for it).

    Raises:
        ValueError: for anything else.
    """
    _check_queries(layout, queries)
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
    check_layout_type(layout)
    spans = [
        (
            check_whole("the first query of a run", first, least=-INT32_MAX),
            check_whole("length of a run", length, least=-INT32_MAX),
        )
        for first, length in spans
    ]
    edges = [0, *(edge for first, length in spans for edge in (first, first + length)), layout.num_tokens]
    if not spans or min(length for _, length in spans) < 1 or edges != sorted(edges):
        raise ValueError(
            f"spans={list(spans)} must be (first, length) of runs that ascend within {layout.num_tokens} tokens and do not overlap"
        )
    if layout.num_queries != layout.num_tokens:
        raise ValueError(
            f"layout of {layout.num_queries} queries must have all {layout.num_tokens}; take runs of build_layout's"
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


def as_layout(
    cu_seqlens: torch.Tensor | DocumentLayout, q: torch.Tensor, k: torch.Tensor, *, block_size: int
) -> DocumentLayout:
    """Returns `cu_seqlens` if it is a layout already (checked against the sizes), else the layout built from it."""
    block_size = check_whole("block_size", block_size, least=1, hint=": keys per block; try 16")
    check_documents(cu_seqlens, q, k)
    if not isinstance(cu_seqlens, DocumentLayout):
        return build_layout(cu_seqlens, num_tokens=k.shape[0], block_size=block_size)
    if cu_seqlens.block_size != block_size:
        raise ValueError(
            f"block_size={block_size} must equal the layout's {cu_seqlens.block_size}; build another layout"
        )
    return cu_seqlens


def check_documents(cu_seqlens: torch.Tensor | DocumentLayout, q: torch.Tensor, k: torch.Tensor) -> None:
    """Raises ValueError unless boundaries or a layout are on q's device and of as many queries and keys."""
    queries, keys = q.shape[0], k.shape[0]
    if isinstance(cu_seqlens, DocumentLayout):
        if cu_seqlens.cu_seqlens.device != q.device:
            raise ValueError(
                f"cu_seqlens, a layout on {cu_seqlens.cu_seqlens.device}, must be on q's device {q.device}; build it there"
            )
        if cu_seqlens.num_tokens != keys:
            raise ValueError(f"num_tokens={keys} of the keys must equal the layout's {cu_seqlens.num_tokens}")
        if cu_seqlens.num_queries != queries:
            raise ValueError(
                f"q has {queries} tokens and the layout {cu_seqlens.num_queries} queries: it needs as many; try query_slice or query_runs"
            )
        return
    check_boundaries(cu_seqlens, keys)
    check_tensors(q=q, cu_seqlens=cu_seqlens)
    if queries != keys:
        raise ValueError(
            f"q has {queries} tokens and k {keys}: without a layout by query_slice or query_runs they need as many"
        )


def layout_to(layout: DocumentLayout, device: torch.device | str) -> DocumentLayout:
    """Returns the layout with its arrays on `device`."""
    arrays = {f.name: getattr(layout, f.name) for f in fields(layout)}
    moved = {name: value.to(device) for name, value in arrays.items() if isinstance(value, torch.Tensor)}
    runs = tuple(
        replace(run, cu_seqlens_q=run.cu_seqlens_q.to(device), cu_seqlens_k=run.cu_seqlens_k.to(device))
        for run in layout.runs
    )
    return replace(layout, **moved, runs=runs)


def check_layout_type(layout: object) -> None:
    """Raises ValueError for what is not a layout."""
    if not isinstance(layout, DocumentLayout):
        raise ValueError(f"layout must be a DocumentLayout by build_layout, got {type(layout).__name__}")


def check_boundaries(cu_seqlens: object, num_tokens: int) -> None:
    """Raises ValueError unless `cu_seqlens` are boundaries of documents within the tokens (their values on a CPU only)."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(
            f"cu_seqlens must be an int32 tensor [documents + 1] or a layout by build_layout, got {type(cu_seqlens).__name__}"
        )
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype} must be int32 [documents + 1]; "
            f"try torch.tensor([0, {num_tokens}], dtype=torch.int32) for one document"
        )
    if looks_at_values(cu_seqlens):
        falls = (cu_seqlens[1:] < cu_seqlens[:-1]).any()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > num_tokens or bool(falls):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()[:8]}... must start with 0, never fall and end at most at num_tokens={num_tokens}"
            )


def _row_bound(num_tokens: int, block_size: int, documents: int) -> int:
    """The block rows that a layout has room for."""
    return min(num_tokens, num_tokens // block_size + documents)


def _check_layout(layout: DocumentLayout) -> None:
    """Raises ValueError unless the arrays are int32 [n] on one device, and their lengths fit each other and the sizes."""
    for name in ARRAYS:
        if not isinstance(getattr(layout, name), torch.Tensor):
            raise ValueError(
                f"{name} of a layout must be a torch.Tensor, got {type(getattr(layout, name)).__name__}; try build_layout"
            )
    device = layout.cu_seqlens.device
    for name in ARRAYS:
        array = getattr(layout, name)
        if array.dim() != 1 or array.dtype is not torch.int32 or array.device != device:
            raise ValueError(
                f"{name} {tuple(array.shape)}, {array.dtype} on {array.device} of a layout must be int32 [n] on {device}; try build_layout"
            )
    for name in ("block_size", "num_tokens", "max_length"):
        check_whole(f"{name} of a layout", getattr(layout, name), least=1)
    documents = len(layout.cu_seqlens) - 1
    wanted = {
        "document_first_row": documents + 1,
        **dict.fromkeys(QUERY_ARRAYS, sum(run.length for run in layout.runs) or max(layout.num_queries, 1)),
        **dict.fromkeys(("block_start", "block_length"), _row_bound(layout.num_tokens, layout.block_size, documents)),
    }
    for name, length in wanted.items():
        if len(getattr(layout, name)) != length:
            raise ValueError(
                f"{name} of {len(getattr(layout, name))} entries must have {length} in a layout of {documents} documents, "
                f"{layout.num_tokens} tokens and blocks of {layout.block_size}; try build_layout, query_slice or query_runs"
            )


def _check_queries(layout: DocumentLayout, queries: object) -> None:
    """Raises ValueError unless `queries` names some of a layout's queries."""
    check_layout_type(layout)
    held = layout.num_queries
    if isinstance(queries, slice):
        if len(range(*queries.indices(held))) < 1 or (queries.step or 1) < 1:
            raise ValueError(f"queries={queries} must name at least one of the layout's {held}, in ascending order")
        return
    check_tensors(layout=layout.cu_seqlens, queries=queries)
    assert isinstance(queries, torch.Tensor)
    if queries.dim() != 1 or len(queries) < 1 or queries.dtype not in INTEGERS:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} and {queries.dtype} must be int64 [n] with n at least 1, or a slice"
        )
    if not looks_at_values(queries):
        return
    if int(queries[0]) < 0 or int(queries[-1]) >= held or bool((queries[1:] <= queries[:-1]).any()):
        raise ValueError(f"queries={queries.tolist()[:8]}... must ascend within the layout's {held} queries")
