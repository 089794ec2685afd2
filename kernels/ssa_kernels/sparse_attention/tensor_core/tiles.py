"""Keys and values repacked into tiles that a warp loads straight into the registers of its matrix instructions (Triton).

A tile is 16 keys of one kv head, K then V. The sparse kernels read tiles at random, 2 * 16 * D elements at a time, so the order of a tile's
elements in memory decides the cost. In the tensor's own order, a tile must pass through shared memory to reach the layout of mma.sync's
operands. Here it is stored in the order of those operands: lane i of the warp finds the 16 bytes that it needs at 16 * i of each 512. A load
then reads one full line after another, needs no shared memory, and leaves the whole L1 for caching tiles.

mma.m16n8k16 takes its second operand [16, 8] as two registers per lane; with r = lane // 4 and c = lane % 4 they hold the elements
(2c, 2c + 1 | r) and (8 + 2c, 9 + 2c | r). Its first operand [16, 16] takes four: (r | 2c, 2c + 1), (8 + r | the same), (r | 8 + 2c, ..),
(8 + r | ..). Tiles are packed for one or the other (`left`: for few_heads.py). Orders, outermost first:

    rows              key bit 3 | d // 32 | r = key % 8 | c = d bits 4, 3 | d bits 2, 1, 0
    rows, left        d // 32 | d bit 2 | r = key % 8 | c = d bits 4, 3 | d bit 1 | key bit 3 | d bit 0
    columns           d // 32 | d bit 2 | r = d bits 4, 3, 0 | c = key bits 2, 1 | d bit 1 | key bit 3 | key bit 0
    columns, left     d // 32 | d bit 2 | r = d bits 4, 3, 0 | c = key bits 2, 1 | key bit 3 | d bit 1 | key bit 0

K is in `rows`, to be contracted over d. V is in `columns` in the forward, where it is contracted over keys, and in `rows` in the backward.

In `rows`, lane (r, c) holds 8 neighbouring d of its key, d = 32 j + 8 c + (0..7). So the instruction's k index stands for d in the order
(d // 32, bits 2, 1, then bits 4, 3, then bit 0). That is free as long as the other operand follows the same order. `columns` distributes
V's d in the same way, so an output row also ends up as 8 neighbouring d per lane. fragments.py is the other side of this.

Blocks start at a tile (the tiles of block row b start at b * K / 16). Keys past the end of a document's last block are zeros.
Cost: K and V are read and written once, 1/8 of the size of q or o at 16 heads per group.
"""

import torch
import triton
import triton.language as tl

from ...documents import DocumentLayout
from ...launch import launch, next_power_of_2

TILE_KEYS = 16


@triton.jit
def _rows(x, DIM: tl.constexpr, LEFT: tl.constexpr):
    """[16, DIM] -> [16 * DIM] in the order `rows`."""
    x = tl.reshape(x, [2, 8, DIM // 32, 4, 2, 2, 2])  # key bit 3 | 2, 1, 0 | d // 32 | d bits 4, 3 | 2 | 1 | 0
    if LEFT:
        x = tl.permute(x, [2, 4, 1, 3, 5, 0, 6])
    else:
        x = tl.permute(x, [0, 2, 1, 3, 4, 5, 6])
    return tl.reshape(x, [16 * DIM])


@triton.jit
def _columns(x, DIM: tl.constexpr, LEFT: tl.constexpr):
    """[16, DIM] -> [16 * DIM] in the order `columns`."""
    x = tl.reshape(x, [2, 4, 2, DIM // 32, 4, 2, 2, 2])  # key bit 3 | 2, 1 | 0 | d // 32 | d bits 4, 3 | 2 | 1 | 0
    if LEFT:
        x = tl.permute(x, [3, 5, 4, 7, 1, 0, 6, 2])
    else:
        x = tl.permute(x, [3, 5, 4, 7, 1, 6, 0, 2])
    return tl.reshape(x, [16 * DIM])


@triton.jit
def pack_kernel(
    k_ptr, v_ptr, start_ptr, length_ptr, tiles_ptr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILES: tl.constexpr, V_COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Packs one tile. Grid: (block rows * TILES, kv heads), with TILES per block."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    block_row, first = tile // TILES, tile % TILES * 16
    key = tl.arange(0, 16)
    dim = tl.arange(0, DIM)
    inside = (first + key < tl.load(length_ptr + block_row))[:, None] & (dim < HEAD_DIM)[None, :]
    token = (tl.load(start_ptr + block_row) + first + key).to(tl.int64)
    source = (token * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    k = tl.load(k_ptr + source, mask=inside, other=0.0)
    v = tl.load(v_ptr + source, mask=inside, other=0.0)
    target = tiles_ptr + (tile.to(tl.int64) * KV_HEADS + kv_head) * (32 * DIM)
    offsets = tl.arange(0, 16 * DIM)
    tl.store(target + offsets, _rows(k, DIM, LEFT))
    tl.store(target + 16 * DIM + offsets, _columns(v, DIM, LEFT) if V_COLUMNS else _rows(v, DIM, LEFT))


def pack_tiles(
    k: torch.Tensor, v: torch.Tensor, layout: DocumentLayout, *, v_columns: bool, left: bool
) -> torch.Tensor:
    """Returns the tiles [block rows * K / 16, kv heads, 2, 16 * padded D] of k and v in their dtype.

    Args:
        k, v: [tokens, kv heads, D], contiguous.
        layout: documents and blocks of K keys, a multiple of 16.
        v_columns: whether V is packed in the order `columns` (forward) or `rows` (backward).
        left: whether the tiles are packed for the first operand.
    """
    _, kv_heads, head_dim = k.shape
    dim = padded_dim(head_dim)
    tiles_per_block = layout.block_size // TILE_KEYS
    num_tiles = layout.num_block_rows * tiles_per_block
    tiles = torch.empty(num_tiles, kv_heads, 2, TILE_KEYS * dim, dtype=k.dtype, device=k.device)
    launch(
        pack_kernel, (num_tiles, kv_heads),
        k, v, layout.block_start, layout.block_length, tiles,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=dim, TILES=tiles_per_block, V_COLUMNS=v_columns, LEFT=left, num_warps=1,
    )  # fmt: skip
    return tiles


def padded_dim(head_dim: int) -> int:
    """Returns D of the tiles: head_dim rounded up to a power of two, at least 64."""
    return max(64, next_power_of_2(head_dim))
