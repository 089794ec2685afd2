"""Layouts of some of the queries over all the keys: a slice, spans of neighbours, or a sample of a layout's queries.

Spans are recorded in the layout for the kernels that need them: the libraries' full attention, and selection, whose tiles of queries must
not reach from one span into the next. A context-parallel rank holds such spans (`query_spans`). A sample (`sample_queries`) also records
where its queries lie among the queries that it was taken from, so that `ssa_attention` can compute one stream for all of them and the other
for the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .checks import INTEGERS, check_tensors, check_whole, looks_at_values
from .documents import INT32_MAX, DocumentLayout, QuerySpan, SpanSegments, check_layout_type


@dataclass(frozen=True, slots=True)
class SampledQueries:
    """Some of a layout's queries, in spans of neighbours."""

    layout: DocumentLayout  # of the sampled queries over all keys
    # (first, length) of each span among the queries of the layout that they were taken from
    slices: tuple[tuple[int, int], ...]
    places: torch.Tensor  # int32 [queries of that layout], each one's place in the sample, -1 if it is not in it

    @property
    def num_queries(self) -> int:
        """The number of queries of the layout that the sample was taken from."""
        return len(self.places)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sampled queries' rows of x [queries, ...], one after another."""
        return torch.cat([x[first : first + length] for first, length in self.slices])

    def add(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Adds `part` [sampled queries, ...] to the sampled queries' rows of `whole` [queries, ...]: one launch for all spans."""
        rows = [whole[first : first + length] for first, length in self.slices]
        pieces = part.split([length for _, length in self.slices])
        torch._foreach_add_(rows, pieces)  # pyright: ignore[reportPrivateImportUsage]


def query_slice(layout: DocumentLayout, queries: slice | torch.Tensor) -> DocumentLayout:
    """Returns the layout of some of the queries over all the keys.

    Neighbouring queries cost least; for spans of neighbours use `query_spans`. Selection in Triton takes 128 / group_size queries of the
    batch as one tile, which walks all block rows from the first query's document to the last query's. A slice of a layout by `query_spans`
    may reach from one span into the next, so its queries count as scattered.

    Args:
        layout: the layout to take queries from.
        queries: at least one: a slice, or int64 or int32 `[n]` on the layout's device, ascending, in [0, queries of the layout). The values
            are checked on a CPU only; on CUDA the caller is responsible.

    Raises:
        ValueError: for anything else.
    """
    _check_queries(layout, queries)
    together = isinstance(queries, slice) and queries.step in (None, 1) and len(layout.spans) < 2
    return replace(
        layout,
        query_start=layout.query_start[queries],
        query_position=layout.query_position[queries],
        query_first_block_row=layout.query_first_block_row[queries],
        spans=(),
        segments=None,
        scattered=layout.scattered or not together,
    )


def query_spans(layout: DocumentLayout, spans: Sequence[tuple[int, int]]) -> DocumentLayout:
    """Returns the layout of spans of neighbouring queries over all the keys.

    Args:
        layout: the layout of all queries.
        spans: (first query, number of queries) of each span, in ascending order.

    Raises:
        ValueError: for spans that are empty, overlap or exceed the tokens, and for a layout of only some queries.
    """
    check_layout_type(layout)
    spans = _check_spans("spans", spans, layout.num_tokens, "tokens")
    if layout.num_queries != layout.num_tokens:
        raise ValueError(
            f"layout of {layout.num_queries} queries must have all {layout.num_tokens}; take spans of build_layout's"
        )
    return _chosen(layout, spans, spans)


def sample_queries(layout: DocumentLayout, slices: Sequence[tuple[int, int]]) -> SampledQueries:
    """Returns a sample of a layout's queries, which may be all of them or those of spans.

    Args:
        layout: by `build_layout` or `query_spans`.
        slices: (first, length) of neighbours among the layout's queries, in ascending order. One that reaches from one of the layout's
            spans into the next is split there.

    Raises:
        ValueError: for slices that are empty, overlap or exceed the queries, and for a layout by `query_slice`.
    """
    check_layout_type(layout)
    slices = _check_spans("slices", slices, layout.num_queries, "queries")
    if not layout.spans and layout.num_queries != layout.num_tokens:
        raise ValueError(
            f"layout of {layout.num_queries} queries must have all {layout.num_tokens} or be one by query_spans"
        )
    held = [(span.first, span.length) for span in layout.spans] or [(0, layout.num_tokens)]
    parts, spans, offset = [], [], 0
    for key, length in held:
        for first, count in slices:
            begin, end = max(first, offset), min(first + count, offset + length)
            if begin < end:
                parts.append((begin, end - begin))
                spans.append((key + begin - offset, end - begin))
        offset += length
    places = torch.full((layout.num_queries,), -1, dtype=torch.int32)
    place = 0
    for first, length in parts:
        places[first : first + length] = torch.arange(place, place + length, dtype=torch.int32)
        place += length
    return SampledQueries(_chosen(layout, parts, spans), tuple(parts), _on_device(places, layout.query_position.device))


def _chosen(
    layout: DocumentLayout, slices: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> DocumentLayout:
    """Returns the layout of the queries of `slices`, (first, length) among the layout's queries, which are `spans` of the tokens."""
    found = []
    for first, length in spans:
        seen = layout.cu_seqlens.clamp(max=first + length)
        found.append(QuerySpan(first, length, (seen - first).clamp(min=0), seen))

    def chosen(array: torch.Tensor) -> torch.Tensor:
        return torch.cat([array[first : first + length] for first, length in slices])

    return replace(
        layout,
        query_start=chosen(layout.query_start),
        query_position=chosen(layout.query_position),
        query_first_block_row=chosen(layout.query_first_block_row),
        spans=tuple(found),
        segments=_segments(found, layout.num_tokens, layout.max_length),
    )


def _segments(spans: Sequence[QuerySpan], num_tokens: int, max_length: int) -> SpanSegments:
    """Returns the spans as one packed batch. A span's keys are copied from where the longest possible document of its first query begins."""
    key_ranges = tuple((max(0, span.first + 1 - max_length), span.end) for span in spans)
    ends = list(accumulate((end - first for first, end in key_ranges), initial=0))
    queries = torch.stack([span.cu_seqlens_q.diff() for span in spans]).flatten()
    keys = torch.stack([span.cu_seqlens_k.diff() for span in spans]).flatten()
    first = torch.stack([span.cu_seqlens_k[:-1] for span in spans])
    moved = [place - first for (first, _), place in zip(key_ranges, ends, strict=False)]  # from a key to its copy
    copies = torch.stack([row + shift for row, shift in zip(first, moved, strict=True)])
    # Every span cuts at most one document more, so at most this many segments have queries.
    most = len(spans[0].cu_seqlens_q) - 1 + len(spans) - 1
    order = torch.argsort(queries == 0, stable=True)[:most]
    some = queries[order] > 0

    def places(firsts: torch.Tensor, end: int) -> torch.Tensor:
        found = torch.where(some, firsts.flatten()[order], end)
        return torch.cat([found, found.new_full((1,), end)]).int()

    ranges = [(first, end, place) for (first, end), place in zip(key_ranges, ends, strict=False)]
    ranges += [(0, 0, 0)] * ((1 << (len(spans) - 1).bit_length()) - len(spans))
    return SpanSegments(
        cu_seqlens_q=_cumulated(queries[order]),
        cu_seqlens_k=_cumulated(torch.where(some, keys[order], 0)),
        first_key=places(first, num_tokens),
        first_copy=places(copies, ends[-1]),
        ranges=_on_device(torch.tensor(ranges, dtype=torch.int32), queries.device),
        key_ranges=key_ranges,
        longest_q=min(max(span.length for span in spans), max_length),
        longest_k=min(max(span.end for span in spans), max_length),
    )


def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a copy of a table on the host, without waiting for the device."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    """Returns int32 boundaries, from 0, of neighbours of these lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _check_spans(name: str, spans: Sequence[tuple[int, int]], most: int, what: str) -> list[tuple[int, int]]:
    """Returns (first, length) as whole numbers. Raises ValueError unless they ascend within `most` and none is empty."""
    checked = [
        (
            check_whole("the first query of a span", first, least=-INT32_MAX),
            check_whole("length of a span", length, least=-INT32_MAX),
        )
        for first, length in spans
    ]
    edges = [0, *(edge for first, length in checked for edge in (first, first + length)), most]
    if not checked or min(length for _, length in checked) < 1 or edges != sorted(edges):
        raise ValueError(
            f"{name}={checked} must be (first, length) of spans that ascend within {most} {what} and do not overlap"
        )
    return checked


def _check_queries(layout: DocumentLayout, queries: object) -> None:
    """Raises ValueError unless `queries` selects some of the layout's queries, in ascending order."""
    check_layout_type(layout)
    num_queries = layout.num_queries
    if isinstance(queries, slice):
        if len(range(*queries.indices(num_queries))) < 1 or (queries.step or 1) < 1:
            raise ValueError(
                f"queries={queries} must name at least one of the layout's {num_queries}, in ascending order"
            )
        return
    check_tensors(layout=layout.cu_seqlens, queries=queries)
    assert isinstance(queries, torch.Tensor)
    if queries.dim() != 1 or len(queries) < 1 or queries.dtype not in INTEGERS:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} and {queries.dtype} must be int64 [n] with n at least 1, or a slice"
        )
    if not looks_at_values(queries):
        return
    if int(queries[0]) < 0 or int(queries[-1]) >= num_queries or bool((queries[1:] <= queries[:-1]).any()):
        raise ValueError(f"queries={queries.tolist()[:8]}... must ascend within the layout's {num_queries} queries")
