"""Documents into rows by best fit: no document is cut, except those longer than a row, which are cut at row lengths.

A piece is a document, or one of the L-token parts of a longer document, or the rest of it. The pieces are taken in
descending length, and each goes into the row with the least room that still holds it, or else begins a row: best fit
decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). A part of L tokens is a row
by itself.

Pieces of one length are placed together. The row with the least room s >= n takes s // n of them before another row is
the best, because what they leave is less than any other room that holds one. So the work grows with the number of
different lengths, and rooms are found in a bit set.

Needs only numpy. Not done here: reading lengths and writing the result (packed_index.py).
"""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece, int64 [pieces]; rows are numbered from 0 without gaps.

    Args:
        lengths: [pieces] integers, tokens per piece, each in 1 to `capacity`.
        capacity: tokens per row.

    Raises:
        ValueError: a length is outside this range.

    Source: arXiv 2404.10830, section 3 (Best-Fit Decreasing).
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths={lengths.min()} to {lengths.max()} must lie in 1 to {capacity}")
    longest_first = np.argsort(lengths, kind="stable")[::-1]
    sizes, counts = np.unique(lengths, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(capacity)
    begin = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        rows[longest_first[begin : begin + count]] = rooms.place(size, count)
        begin += count
    return rows


class _Rooms:
    """The rows that have room left, by how much: lists of rows, and a bit set of the rooms whose list is not empty."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: dict[int, list[int]] = {}
        self._open = 0  # bit s: a row has room for s tokens
        self._num_rows = 0

    def place(self, size: int, count: int) -> np.ndarray:
        """Returns the rows of `count` pieces of `size` tokens."""
        found = []
        while count:
            room, rows = self._tightest(size, count)
            each = room // size
            taken = np.repeat(rows, each)[:count]
            found.append(taken)
            last = len(taken) - each * (len(rows) - 1)  # pieces in the last of these rows
            self._leave(room - each * size, rows[:-1])
            self._leave(room - last * size, rows[-1:])
            count -= len(taken)
        return np.concatenate(found)

    def _tightest(self, size: int, count: int) -> tuple[int, list[int]]:
        """Removes and returns rows with the least room for a piece, as many as `count` pieces need; new rows if there are none."""
        above = self._open >> size
        if not above:
            first, needed = self._num_rows, -(-count // (self._capacity // size))
            self._num_rows += needed
            return self._capacity, list(range(first, self._num_rows))
        room = size + (above & -above).bit_length() - 1
        rows, needed = self._rows[room], -(-count // (room // size))
        if needed >= len(rows):
            self._open ^= 1 << room
            return room, self._rows.pop(room)
        self._rows[room] = rows[:-needed]
        return room, rows[-needed:]

    def _leave(self, room: int, rows: list[int]) -> None:
        """Returns rows with so much room to the set."""
        if room and rows:
            self._rows.setdefault(room, []).extend(rows)
            self._open |= 1 << room
