"""Which drawn queries compute the counterpart, against a count query by query."""

from dataclasses import replace

import numpy as np
import pytest

from ssa_pretrain.config import AttentionConfig
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.data.spans import total
from ssa_pretrain.engine.counterpart import CELL, counterpart_queries

LENGTH, REACH = 1024, 128
ATTENTION = AttentionConfig(block_size=16, top_k=REACH // 16)


def microbatch(*starts: list[int], padding: int = 0) -> Batch:
    """Returns rows whose documents begin at `starts`; the last row ends with padding."""
    rows = []
    for places in starts:
        flags = np.zeros(LENGTH + 1, dtype=bool)
        flags[places] = True
        rows.append(Row(np.zeros(LENGTH + 1, dtype=np.int64), flags))
    rows[-1] = replace(rows[-1], padding=padding)
    return collate(rows, index=0, padding_document=REACH)


def queries(spans) -> set[int]:
    return {query for first, length in spans for query in range(first, first + length)}


@pytest.mark.parametrize("seed", range(20))
def test_computed_queries_are_the_drawn_ones_in_cells_that_are_not_covered(seed: int) -> None:
    generator = np.random.default_rng(seed)
    documents = [[0, *generator.choice(LENGTH, size=generator.integers(0, 12)).tolist()] for _ in range(2)]
    batch = microbatch(*documents, padding=int(generator.integers(0, 400)))
    edges = np.sort(generator.choice(2 * LENGTH, size=10, replace=False)).tolist()
    drawn = [(first, end - first) for first, end in zip(edges[::2], edges[1::2], strict=True)]
    found = counterpart_queries(ATTENTION, batch, drawn)
    assert found.spans is not None and found.spans == sorted(found.spans)
    uncovered = {query for query, position in enumerate(batch.positions.tolist()) if position >= REACH}
    cells = {query // CELL for query in uncovered}
    assert queries(found.spans) == {query for query in queries(drawn) if query // CELL in cells}
    assert total(found.spans) == len(queries(found.spans)), "no query twice"
    assert found.num_drawn == len(queries(drawn) - queries(batch.padding))


@pytest.mark.parametrize(
    ("starts", "padding", "spans", "num_drawn"),
    [
        ([[0]], 0, None, LENGTH),
        ([[0, 512]], 0, None, LENGTH),
        ([list(range(0, LENGTH, REACH))], 0, [], LENGTH),
        ([[0]], 1 + 128, None, LENGTH - 128),
    ],
)
def test_all_queries_go_through_one_operator_unless_none_is_computed(
    starts: list[list[int]], padding: int, spans: list | None, num_drawn: int
) -> None:
    found = counterpart_queries(ATTENTION, microbatch(*starts, padding=padding), [(0, LENGTH)])
    assert (found.spans, found.num_drawn) == (spans, num_drawn)


def test_boundaries_stay_on_the_host() -> None:
    batch = microbatch([0, 100], [0])
    assert batch.boundaries == (0, 100, LENGTH, 2 * LENGTH) == replace(batch, num_rows=None).boundaries
