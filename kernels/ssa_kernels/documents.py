"""The layout of packed documents and their blocks: device arrays that all kernels of a microbatch share.

Documents are packed one after another along the token axis; `cu_seqlens` holds their boundaries. Blocks belong to documents: each document
starts a new block, and its last block may be short. Numbering the blocks of all documents consecutively gives *block rows*: document d owns
the block rows from `document_first_block_row[d]` on, and its block b is block row `document_first_block_row[d] + b`.

Everything is computed on the device from `cu_seqlens`, by two kernels (documents_triton.py) or in plain PyTorch, without waiting for the
device: sizes depend only on shapes. There are at most T // K + (number of documents) block rows, because a document of length l has
ceil(l / K) <= l // K + 1 blocks. Block rows past the last document's have length 0. Build one layout per microbatch and pass it to every layer as `cu_seqlens`.

A query's document and position are read from per-query arrays, never from its place in the batch. Hence a layout of some of the queries
(queries.py): a rank that holds some of them, a sample, or a decoding step with one uses the same kernels over the same keys.

Boundaries are checked on a CPU. On CUDA that would mean waiting, so they are clamped into order: the first counts as 0, and each is at
least the one before it and at most num_tokens. On both, tokens past the last boundary form one more document. So no kernel can access
memory outside its tensors. A `max_length` below a document's length is refused on a CPU. On CUDA the caller is responsible: that batch's
results are undefined, but no access leaves a tensor.

A layout checks its own arrays when it is built and makes them contiguous, so operators only compare sizes with it. Build layouts only with
`build_layout` and queries.py.
"""

from dataclasses import dataclass, fields, replace
from importlib.util import find_spec

import torch

from .checks import INTEGERS, check_tensors, check_whole, looks_at_values

INT32_MAX = 2**31 - 1
QUERY_ARRAYS = ("query_start", "query_position", "query_first_block_row")
ARRAYS = ("cu_seqlens", "document_first_block_row", *QUERY_ARRAYS, "block_start", "block_length")


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """Neighbouring queries and the keys up to the last of them, by document: one call of attention on packed documents.

    Document d has the queries [cu_seqlens_q[d], cu_seqlens_q[d + 1]) of the span and the keys [cu_seqlens_k[d], cu_seqlens_k[d + 1]) of
    the sequence. Its queries are the last of its keys, so a causal mask aligned at the bottom right is exact. Documents before the span
    have keys but no queries; documents after it have neither.
    """

    first: int  # key of the first query
    length: int
    cu_seqlens_q: torch.Tensor  # int32 [documents + 1], ending with length
    cu_seqlens_k: torch.Tensor  # int32 [documents + 1], ending with end

    @property
    def end(self) -> int:
        """The key after the last query's own key. The span's queries see only keys before it."""
        return self.first + self.length


@dataclass(frozen=True, slots=True)
class SpanSegments:
    """All spans as one packed batch for a library's kernel: one segment for each document in each span, then empty segments.

    Segments of different spans see the same keys, which a forward reads where they are. In a backward each span has copies of its keys, one
    span after another, so that no two segments share a key and gradients need no atomic sums.
    """

    cu_seqlens_q: torch.Tensor  # int32 [segments + 1], cumulated queries
    cu_seqlens_k: torch.Tensor  # int32 [segments + 1], cumulated keys that the segments' queries see
    first_key: torch.Tensor  # int32 [segments + 1], each segment's first key, ending with the number of keys
    first_copy: torch.Tensor  # int32 [segments + 1], its place among the copies, ending with their number
    # int32 [spans rounded up to a power of two, 3]: first key that is copied, end, and the first copy's place; 0, 0, 0 for no span
    ranges: torch.Tensor
    key_ranges: tuple[tuple[int, int], ...]  # (first, end) of the keys that are copied for each span
    longest_q: int  # no segment has more queries
    longest_k: int  # or sees more keys


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """Documents and blocks of one packed sequence. All arrays are int32, contiguous and on one device.

    Raises:
        ValueError: for arrays that do not fit each other, the block size or the number of tokens.
    """

    cu_seqlens: torch.Tensor  # [documents + 1] first token of each document, ending with num_tokens
    # [documents + 1] block row of each document's block 0, ending with the number of block rows in use
    document_first_block_row: torch.Tensor
    query_start: torch.Tensor  # [T] first token of the query's document
    query_position: (
        torch.Tensor
    )  # [T] the query's position in its document; its own key is query_start + query_position
    query_first_block_row: torch.Tensor  # [T] block row of the first block of the query's document
    block_start: torch.Tensor  # [R] first token of each block row
    block_length: torch.Tensor  # [R] tokens of each block row, 0 if unused
    block_size: int
    num_tokens: int  # number of keys; query_position has one entry per query
    max_length: int  # no document is longer; bounds workspaces and loops; num_tokens if nothing better is known
    spans: tuple[
        QuerySpan, ...
    ] = ()  # the spans that the queries form, in order, if built by `query_spans` or `sample_queries`
    segments: SpanSegments | None = None  # the same spans as one batch
    scattered: bool = False  # whether neighbours among the queries may be far apart in the sequence

    def __post_init__(self) -> None:
        _check_layout(self)
        for name in QUERY_ARRAYS:
            if not getattr(self, name).is_contiguous():
                object.__setattr__(self, "scattered", True)
        for name in ARRAYS:
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @property
    def num_queries(self) -> int:
        """The number of queries: some or all of the tokens."""
        return self.query_position.shape[0]

    @property
    def num_block_rows(self) -> int:
        """R, the bound on the number of all documents' blocks."""
        return self.block_start.shape[0]

    @property
    def query_keys(self) -> torch.Tensor:
        """int32 [queries]: the token of each query's own key."""
        return self.query_start + self.query_position


def build_layout(
    cu_seqlens: torch.Tensor, *, num_tokens: int, block_size: int, max_length: int | None = None
) -> DocumentLayout:
    """Returns the layout of documents with boundaries `cu_seqlens`.

    Args:
        cu_seqlens: int32 or int64 `[documents + 1]`, starting with 0, non-decreasing. Repeated entries are empty documents.
        num_tokens: length of the token axis, in [1, 2^31).
        block_size: keys per block.
        max_length: bound on a document's length, if the host knows one (for packed rows: the row length). The tokens past the last
            boundary are a document too.

    Raises:
        ValueError: for a wrong type, dtype or shape, and on a CPU for wrong boundaries or a document longer than max_length.
    """
    num_tokens = check_whole("num_tokens", num_tokens, least=1)
    block_size = check_whole("block_size", block_size, least=1, hint=": keys per block; try 16")
    if max_length is not None:
        max_length = check_whole("max_length", max_length, least=1, hint=", or None")
    if max(num_tokens, block_size) > INT32_MAX:
        raise ValueError(f"num_tokens={num_tokens} and block_size={block_size} must lie below 2^31")
    check_boundaries(cu_seqlens, num_tokens)
    max_length = num_tokens if max_length is None else min(max_length, num_tokens)
    num_block_rows = _block_row_bound(num_tokens, block_size, len(cu_seqlens))
    if _fits_kernels(cu_seqlens):
        from .documents_triton import layout_arrays  # imported here because Triton may be missing on a CPU machine

        arrays = layout_arrays(cu_seqlens, num_tokens=num_tokens, block_size=block_size, num_block_rows=num_block_rows)
    else:
        arrays = _layout_arrays(cu_seqlens, num_tokens, block_size, num_block_rows, max_length)
    return DocumentLayout(
        cu_seqlens=arrays["cu_seqlens"],
        document_first_block_row=arrays["document_first_block_row"],
        query_start=arrays["query_start"],
        query_position=arrays["query_position"],
        query_first_block_row=arrays["query_first_block_row"],
        block_start=arrays["block_start"],
        block_length=arrays["block_length"],
        block_size=block_size,
        num_tokens=num_tokens,
        max_length=max_length,
    )


def _fits_kernels(cu_seqlens: torch.Tensor) -> bool:
    """Returns whether Triton can compute a layout's arrays: from a plain tensor on the current GPU, outside torch.compile."""
    if type(cu_seqlens) is not torch.Tensor or not cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return False
    return cu_seqlens.device.index == torch.cuda.current_device() and find_spec("triton") is not None


def _layout_arrays(
    cu_seqlens: torch.Tensor, num_tokens: int, block_size: int, num_block_rows: int, max_length: int
) -> dict[str, torch.Tensor]:
    """Returns the arrays of a layout by name, in plain PyTorch. Raises ValueError on a CPU for a document longer than max_length."""
    device = cu_seqlens.device
    ends = document_ends(cu_seqlens, num_tokens)
    lengths = ends[1:] - ends[:-1]
    if looks_at_values(lengths) and (longest := int(lengths.max())) > max_length:
        raise ValueError(
            f"max_length={max_length} must be at least the longest document's {longest} tokens; try None, or {longest}"
        )
    first_block_row = torch.zeros_like(ends)
    first_block_row[1:] = torch.cumsum((lengths + (block_size - 1)) // block_size, 0, dtype=torch.int32)

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    document = torch.searchsorted(ends[1:], token, right=True).clamp(max=len(lengths) - 1)
    start = ends[document]

    block_row = torch.arange(num_block_rows, dtype=torch.int32, device=device)
    its_document = torch.searchsorted(first_block_row[1:], block_row, right=True).clamp(max=len(lengths) - 1)
    block_start = ends[its_document] + (block_row - first_block_row[its_document]) * block_size
    block_length = (ends[its_document + 1] - block_start).clamp(0, block_size)
    return {
        "cu_seqlens": ends,
        "document_first_block_row": first_block_row,
        "query_start": start,
        "query_position": token - start,
        "query_first_block_row": first_block_row[document],
        "block_start": block_start.clamp(max=num_tokens),
        "block_length": block_length,
    }


def document_ends(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns int32 boundaries in order, from 0 to num_tokens. Tokens past the last boundary form one more document."""
    first = cu_seqlens.new_zeros(1, dtype=torch.int32)
    inner = cu_seqlens[1:].clamp(0, num_tokens).to(torch.int32)
    ends = torch.cat([first, inner, first.new_full((1,), num_tokens)])
    return ends if ends.is_cpu else ends.cummax(0).values  # on a CPU they are checked


def as_layout(
    cu_seqlens: torch.Tensor | DocumentLayout, q: torch.Tensor, k: torch.Tensor, *, block_size: int
) -> DocumentLayout:
    """Returns `cu_seqlens` if it is a layout, checked against the sizes, else the layout built from it."""
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
    """Raises ValueError unless the boundaries or the layout are on q's device and have as many queries and keys as q and k."""
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
                f"q has {queries} tokens and the layout {cu_seqlens.num_queries} queries: the two must be equal; try query_slice or query_spans"
            )
        return
    check_boundaries(cu_seqlens, keys)
    check_tensors(q=q, cu_seqlens=cu_seqlens)
    if queries != keys:
        raise ValueError(
            f"q has {queries} tokens and k {keys}: without a layout by query_slice or query_spans they must be equal"
        )


def layout_to(layout: DocumentLayout, device: torch.device | str) -> DocumentLayout:
    """Returns the layout with its arrays on `device`."""
    arrays = {f.name: getattr(layout, f.name) for f in fields(layout)}
    moved = {name: value.to(device) for name, value in arrays.items() if isinstance(value, torch.Tensor)}
    spans = tuple(
        replace(span, cu_seqlens_q=span.cu_seqlens_q.to(device), cu_seqlens_k=span.cu_seqlens_k.to(device))
        for span in layout.spans
    )
    segments = layout.segments
    if segments is not None:
        held = {f.name: getattr(segments, f.name) for f in fields(segments)}
        segments = replace(segments, **{name: x.to(device) for name, x in held.items() if isinstance(x, torch.Tensor)})
    return replace(layout, **moved, spans=spans, segments=segments)


def check_layout_type(layout: object) -> None:
    """Raises ValueError unless the argument is a layout."""
    if not isinstance(layout, DocumentLayout):
        raise ValueError(f"layout must be a DocumentLayout by build_layout, got {type(layout).__name__}")


def check_boundaries(cu_seqlens: object, num_tokens: int) -> None:
    """Raises ValueError unless `cu_seqlens` are boundaries of documents within the tokens. Values are checked on a CPU only."""
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
        decreases = (cu_seqlens[1:] < cu_seqlens[:-1]).any()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > num_tokens or bool(decreases):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()[:8]}... must start with 0, never decrease and not exceed num_tokens={num_tokens}"
            )


def _block_row_bound(num_tokens: int, block_size: int, documents: int) -> int:
    """Returns the number of block rows that a layout has room for."""
    return min(num_tokens, num_tokens // block_size + documents)


def _check_layout(layout: DocumentLayout) -> None:
    """Raises ValueError unless the arrays are int32 [n] on one device, with lengths that fit each other and the sizes."""
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
        "document_first_block_row": documents + 1,
        **dict.fromkeys(QUERY_ARRAYS, sum(span.length for span in layout.spans) or max(layout.num_queries, 1)),
        **dict.fromkeys(
            ("block_start", "block_length"), _block_row_bound(layout.num_tokens, layout.block_size, documents)
        ),
    }
    for name, length in wanted.items():
        if len(getattr(layout, name)) != length:
            raise ValueError(
                f"{name} of {len(getattr(layout, name))} entries must have {length} in a layout of {documents} documents, "
                f"{layout.num_tokens} tokens and blocks of {layout.block_size}; try build_layout, query_slice or query_spans"
            )
