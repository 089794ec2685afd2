"""Helpers of the dK/dV kernels (Gluon): a program's segment of the inverted index, and the rows that a step takes from it.

A step takes STEP_ROWS rows of q and dO. An entry (query and list) fills ENTRY_ROWS of them, its HEADS rounded up to a power of two, so a
step takes STEP_ROWS / ENTRY_ROWS entries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def segment_of_program(segments_ptr, schedule_ptr):
    """Returns (segment, its bucket, its first place in `choices`, its length)."""
    segment = gl.load(schedule_ptr + gl.program_id(0))
    bucket = gl.load(segments_ptr + segment * 3)
    begin = gl.load(segments_ptr + segment * 3 + 1)
    length = gl.load(segments_ptr + segment * 3 + 2)
    return segment, bucket, begin, length


@gluon.jit
def entries(
    choices_ptr, step, length,
    TOP_K: gl.constexpr, HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Returns the entries of a step's rows and whether each row exists. A step of one entry returns it as a scalar.

    Past the end, rows repeat the last entry.
    """
    row = gl.arange(0, STEP_ROWS, LAYOUT)
    place = step * (STEP_ROWS // ENTRY_ROWS) + row // ENTRY_ROWS
    used = (place < length) & (row % ENTRY_ROWS < HEADS)
    if STEP_ROWS == ENTRY_ROWS:
        place = step
    return (gl.load(choices_ptr + gl.minimum(place, length - 1)) // TOP_K).to(gl.int32), used


@gluon.jit
def head_of_row(HEADS: gl.constexpr, ENTRY_ROWS: gl.constexpr, STEP_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Returns the head, within its entry, of each of a step's rows. Rows past an entry's heads repeat its last head."""
    head = gl.arange(0, STEP_ROWS, LAYOUT) % ENTRY_ROWS
    if HEADS < ENTRY_ROWS:
        head = gl.minimum(head, HEADS - 1)
    return head
