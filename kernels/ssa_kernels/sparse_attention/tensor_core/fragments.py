"""Register layouts of the tensor-core kernels (Gluon): loads that place elements where mma.sync expects its operands.

The kernels of forward.py, backward.py and few_heads.py use no shared memory. Every operand is loaded from global memory by 16-byte loads
into the lane that needs it. These functions only rename registers: reshapes, permutations and layout conversions that must be trivial
(`assert_trivial`: the compiler rejects anything that would move data between lanes). 16-bit elements travel as 32-bit *words* of two
neighbours along d. `halves` splits them just before use, because carrying pairs of 16-bit values through a loop costs two moves per word.

Contraction order: the instruction's k index stands for d as tiles.py explains. Lane (r, c) holds words 16 j + 4 c + (0..3) of a natural row
of words [rows, D / 2]; `to_contraction_order` brings them into that order. `store_rows` stores accumulators whose columns are d in
contraction order, 8 neighbouring d per lane. *Rows* are rows of matrices: heads, keys or the rows of a step.

The one instruction that moves data is movmatrix in `turned`: it transposes the 8 x 8 submatrix that one register of a warp holds. From rows
[R, D] as right operand of a contraction over d it makes the same rows ready for a contraction over the rows. They are loaded once and used
twice, without a second load and without shared memory.

Requires 16-bit elements and compute capability 8.0 or later. Sources: PTX ISA, sections on mma.m16n8k16 and movmatrix.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def mma_layout(warps, column_warps=1):
    """Returns the layout of accumulators [16 * warps, n]: 16 rows per warp, or per `column_warps` warps that share their columns."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, column_warps], instr_shape=[16, 8])


@gluon.constexpr_function
def _bits(first, end):
    """Returns the numbers first, 2 * first, 4 * first, ... below end."""
    values = []
    while first < end:
        values.append(first)
        first *= 2
    return values


@gluon.constexpr_function
def words_layout(rows, words, rows_per_warp, replicas=1):
    """Returns the layout of natural rows of words: lane = 4 * (row % 8) + word // 4 % 4. Groups of `replicas` warps hold the same rows."""
    registers = [[0, 1], [0, 2]] + [[0, w] for w in _bits(16, words)] + [[r, 0] for r in _bits(8, rows_per_warp)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 0] for _ in _bits(1, replicas)] + [[r, 0] for r in _bits(rows_per_warp, rows)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, words])


@gluon.constexpr_function
def rows_layout(rows, dims, warps):
    """Returns the layout of natural rows of elements, as accumulators are stored: lane = 4 * (row % 8) + d // 8 % 4."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, d] for d in _bits(32, dims)] + [[8, 0]]
    registers += [[r, 0] for r in _bits(16 * warps, rows)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    across = [[r, 0] for r in _bits(16, 16 * warps)]
    return gl.DistributedLinearLayout(registers, lanes, across, [], [rows, dims])


@gluon.constexpr_function
def packed_layout(words):
    """Returns the layout of a tile's words in memory order: 4 words per lane, then the next 512 bytes."""
    registers = [[1], [2]] + [[w] for w in _bits(128, words)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [], [], [words])


@gluon.jit
def halves(words, DTYPE: gl.constexpr):
    """Words [...] -> elements [..., 2]."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@gluon.jit
def to_contraction_order(words, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Natural words [ROWS, DIM / 2] -> words with d in contraction order."""
    words = gl.reshape(words, [ROWS, DIM // 32, 4, 2, 2])
    return gl.reshape(gl.permute(words, [0, 1, 3, 4, 2]), [ROWS, DIM // 2])


@gluon.jit
def tile_rows(tile, DIM: gl.constexpr, LEFT: gl.constexpr):
    """A packed tile in the order `rows` -> words [16, DIM / 2] with d in contraction order."""
    if LEFT:
        words = gl.permute(gl.reshape(tile, [DIM // 32, 2, 8, 4, 2, 2]), [5, 2, 0, 1, 4, 3])
    else:
        words = gl.permute(gl.reshape(tile, [2, DIM // 32, 8, 4, 2, 2]), [0, 2, 1, 4, 5, 3])
    return gl.reshape(words, [16, DIM // 2])


@gluon.jit
def tile_columns(tile, DIM: gl.constexpr, DTYPE: gl.constexpr, LEFT: gl.constexpr):
    """A packed tile in the order `columns` -> elements [DIM, 16 keys], d in contraction order; for `left`, or `right` of the transpose."""
    words = gl.reshape(tile, [DIM // 32, 2, 8, 4, 2, 2])
    if LEFT:
        words = gl.permute(words, [0, 1, 5, 2, 4, 3])
    else:
        words = gl.permute(words, [0, 1, 4, 2, 5, 3])
    return gl.reshape(halves(gl.reshape(words, [DIM, 8]), DTYPE), [DIM, 16])


@gluon.jit
def as_left(words, MMA: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Words [ROWS, DIM / 2] in contraction order -> left operand [ROWS, DIM], for a contraction over d."""
    return left(gl.reshape(halves(words, DTYPE), [ROWS, DIM]), MMA)


@gluon.jit
def as_right_transposed(words, MMA: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Words [ROWS, DIM / 2] in contraction order -> right operand [DIM, ROWS], for a contraction over d."""
    return right(gl.permute(gl.reshape(halves(words, DTYPE), [ROWS, DIM]), [1, 0]), MMA)


@gluon.jit
def turned(words, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Words [ROWS, DIM / 2] -> elements [DIM, ROWS], in each lane by pairs of rows; for `left`, or `right` of the transpose."""
    # A register holds words (row 8 b + r, d 8 a + 2 c): an 8 x 8 matrix of elements, transposed in place.
    words = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
    )
    # Now it holds (d 8 a + r, rows 8 b + 2 c and the next).
    words = gl.permute(gl.reshape(words, [ROWS // 8, 8, DIM // 8, 4]), [2, 1, 0, 3])
    return gl.reshape(halves(gl.reshape(words, [DIM, ROWS // 2]), DTYPE), [DIM, ROWS])


@gluon.jit
def as_right(words, MMA: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Words [ROWS, DIM / 2] in contraction order -> right operand [ROWS, DIM], for a contraction over the rows."""
    return right(gl.permute(turned(words, ROWS, DIM, DTYPE), [1, 0]), MMA)


@gluon.jit
def weights_as_left(p, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """An accumulator-shaped [M, n] -> left operand of a contraction over n, rounded to DTYPE."""
    return left(p.to(DTYPE), MMA)


@gluon.jit
def weights_as_right(p, MMA: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """An accumulator-shaped [ROWS, COLUMNS] -> right operand of a contraction over the rows, rounded to DTYPE."""
    low, high = gl.split(gl.reshape(p.to(DTYPE), [ROWS, COLUMNS // 2, 2]))
    low, high = low.to(gl.int16, bitcast=True), high.to(gl.int16, bitcast=True)
    words = gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )
    return as_right(words, MMA, ROWS, COLUMNS, DTYPE)


@gluon.jit
def ones_as_right(MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Ones [16, 8] as right operand: weights times ones are the sums of the rounded weights, in each column."""
    return gl.full([16, 8], 1.0, DTYPE, gl.DotOperandLayout(1, MMA, 2))


@gluon.jit
def ones_as_left(MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Ones [16, 16] as left operand: ones times weights are the sums of the rounded weights, in each row."""
    return gl.full([16, 16], 1.0, DTYPE, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def left(x, MMA: gl.constexpr):
    """Elements that are placed for it -> left operand."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def right(x, MMA: gl.constexpr):
    """Elements that are placed for it -> right operand."""
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def dot_of_rows(a, b, ROWS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Words [ROWS, DIM / 2] of a and b in the same order -> the rows' dot products [ROWS], in float32."""
    products = halves(a, DTYPE).to(gl.float32) * halves(b, DTYPE).to(gl.float32)
    return gl.sum(gl.reshape(products, [ROWS, DIM]), 1)


@gluon.jit
def _store(place, x, inside, ADD: gl.constexpr):
    """Stores x. ADD: adds x to the present values."""
    if ADD:
        x = (gl.load(place, mask=inside, other=0.0).to(gl.float32) + x).to(place.dtype.element_ty)
    gl.store(place, x, mask=inside)


@gluon.jit
def store_rows(
    ptr, acc, ROWS: gl.constexpr, PADDED_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ADD: gl.constexpr = False
):  # fmt: skip
    """Stores accumulators [PADDED_ROWS, DIM], d in contraction order, as natural rows [ROWS, HEAD_DIM]. ADD: adds them to the present values."""
    LAYOUT: gl.constexpr = rows_layout(PADDED_ROWS, DIM, gl.num_warps())
    if not ADD:
        acc = acc.to(ptr.dtype.element_ty)
    x = gl.permute(gl.reshape(acc, [PADDED_ROWS, DIM // 32, 2, 2, 4, 2]), [0, 1, 4, 2, 3, 5])
    x = gl.convert_layout(gl.reshape(x, [PADDED_ROWS, DIM]), LAYOUT, assert_trivial=True)
    row = gl.arange(0, PADDED_ROWS, gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    inside = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    _store(ptr + row[:, None] * HEAD_DIM + dim[None, :], x, inside, ADD)


@gluon.jit
def store_columns(
    ptr, acc, ROWS: gl.constexpr, PADDED_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ADD: gl.constexpr = False
):  # fmt: skip
    """Stores accumulators [DIM, PADDED_ROWS], d in contraction order, as natural rows [ROWS, HEAD_DIM]. Moves data between lanes.

    ADD: adds them to the present values.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [1, 1], [1, 0])
    if not ADD:
        acc = acc.to(ptr.dtype.element_ty)
    x = gl.reshape(acc, [DIM // 32, 2, 2, 4, 2, PADDED_ROWS])
    x = gl.reshape(gl.permute(x, [5, 0, 3, 1, 2, 4]), [PADDED_ROWS, DIM])
    x = gl.convert_layout(x, LAYOUT)
    row = gl.arange(0, PADDED_ROWS, gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    inside = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    _store(ptr + row[:, None] * HEAD_DIM + dim[None, :], x, inside, ADD)
