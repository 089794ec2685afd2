"""The queries of a microbatch that compute the counterpart: those drawn, without padding and without those that the chosen blocks cover.

A query with at most top_k blocks up to its own, which are the first top_k * block_size queries of a document, has all of them chosen. Both streams
see the same keys there: the alignment is 0 with a gradient of 0, and the captured mass is 1. Such queries count in the means, but nothing is
computed for them. Every score of `select_blocks` guarantees this, official_compat too, since its top_k is at most block_size. An attention method
that overrides `SSAAttention.select` must guarantee it as well. Padding is cut into documents that short, so no padding is ever computed.

Queries are left out in whole cells, so that spans have lengths that the kernels' tiles divide.

Everything is arithmetic on the host: a microbatch keeps its documents and padding there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ssa_pretrain.config import AttentionConfig
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.data.spans import Span, intersection, total

CELL = 64  # neighbouring tokens; at least the queries of one tile of selection at group size 2 or more


@dataclass(frozen=True, slots=True)
class CounterpartQueries:
    """The queries of one microbatch, over all context ranks.

    Attributes:
        spans: of the queries that compute the counterpart, ascending; None: all tokens.
        num_drawn: drawn queries other than padding, whether computed or covered.
    """

    spans: list[Span] | None
    num_drawn: int


def counterpart_queries(attention: AttentionConfig, batch: Batch, drawn: Sequence[Span]) -> CounterpartQueries:
    """Returns which of the drawn queries of a microbatch compute the counterpart.

    Args:
        attention: its blocks.
        batch: the whole microbatch.
        drawn: spans of the drawn queries, ascending (schedule.counterpart_spans).
    """
    num_tokens, reach = batch.boundaries[-1], attention.top_k * attention.block_size
    uncovered = [(begin + reach, end) for begin, end in pairwise(batch.boundaries) if begin + reach < end]
    spans = intersection(drawn, _whole_cells(uncovered, num_tokens))
    num_drawn = total(drawn) - total(intersection(drawn, batch.padding))
    if spans and total(drawn) == num_tokens:
        return CounterpartQueries(None, num_drawn)  # one fused operator over all tokens is faster than leaving some out
    return CounterpartQueries(spans, num_drawn)


def _whole_cells(ranges: Sequence[tuple[int, int]], num_tokens: int) -> list[Span]:
    """Returns the spans of the cells that the ranges (begin, end) touch, ascending and merged."""
    found: list[Span] = []
    for begin, end in ranges:
        begin, end = begin // CELL * CELL, min(-(-end // CELL) * CELL, num_tokens)
        if found and begin <= sum(found[-1]):
            begin = found.pop()[0]
        found.append((begin, end - begin))
    return found
