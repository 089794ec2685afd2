"""The benchmark's inputs: random q, k, v and gates, packed documents, and synthetic choices of blocks."""

from dataclasses import dataclass

import torch

from ssa_kernels.documents import DocumentLayout, build_layout

BLOCK_SIZE = 16
TOP_K = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of equal length, and the heads."""

    name: str
    num_rows: int
    row_length: int
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 64

    @property
    def tokens(self) -> int:
        """The total number of tokens."""
        return self.num_rows * self.row_length


SHAPE_8K = Shape("8k", 8, 8192)
SHAPE_32K = Shape("32k", 2, 32768)
SHAPE_64K = Shape("64k", 1, 65536)
SHAPE_128K = Shape("128k", 1, 131072)
SHAPE_8K_G4 = Shape("8k, G 4, D 128", 8, 8192, 32, 8, 128)
SHAPE_8K_D256 = Shape("8k, 16 heads, G 2, D 256", 8, 8192, 16, 2, 256)


def random_heads(shape: Shape, heads: int, seed: int) -> torch.Tensor:
    """Returns bf16 [tokens, heads, D], normal with variance 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (shape.tokens, heads, shape.head_dim)
    return torch.randn(size, device="cuda", generator=generator, dtype=torch.bfloat16)


def equal_rows(shape: Shape) -> DocumentLayout:
    """Returns the layout of one document per row."""
    ends = torch.arange(shape.num_rows + 1, device="cuda", dtype=torch.int32) * shape.row_length
    return build_layout(ends, num_tokens=shape.tokens, block_size=BLOCK_SIZE, max_length=shape.row_length)


def mirrored_slices(shape: Shape, share: float) -> list[tuple[int, int]]:
    """Returns (first, length) of the slices of a share of each row's queries, as training draws them.

    A row is cut into 16 chunks, or into more of 1,024 queries, and chunk i is paired with the one as far from the row's end. Evenly spaced
    pairs are taken. The keys of the two chunks of a pair add up to the same number for every pair, so the sample has the mean cost.
    """
    pairs = max(8, shape.row_length // 2048)
    length, count = shape.row_length // (2 * pairs), round(share * pairs)
    taken = [(2 * i + 1) * pairs // (2 * count) for i in range(count)]
    chunks = sorted([*taken, *(2 * pairs - 1 - pair for pair in taken)])
    return [(row * shape.row_length + chunk * length, length) for row in range(shape.num_rows) for chunk in chunks]


def random_documents(shape: Shape, mean_length: int, seed: int = 0) -> DocumentLayout:
    """Returns the layout of documents with exponentially distributed lengths, cut at the ends of rows, as packing does."""
    generator = torch.Generator().manual_seed(seed)
    ends = [0]
    for row in range(shape.num_rows):
        while ends[-1] < (row + 1) * shape.row_length:
            length = 1 + int(torch.empty(1).exponential_(1 / mean_length, generator=generator))
            ends.append(min(ends[-1] + length, (row + 1) * shape.row_length))
    boundaries = torch.tensor(ends, device="cuda", dtype=torch.int32)
    return build_layout(boundaries, num_tokens=shape.tokens, block_size=BLOCK_SIZE, max_length=shape.row_length)


def uniform_choices(shape: Shape, layout: DocumentLayout, *, sink: bool, seed: int = 0) -> torch.Tensor:
    """Returns int32 [tokens, G, TOP_K] choices: blocks drawn uniformly from each query's earlier ones, and its own block.

    The earlier blocks are split into TOP_K - 1 classes by their number, and one block is drawn from each, so none repeats. With `sink`,
    block 0 is always drawn from the first class.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    classes = TOP_K - 1
    own = (layout.query_position // BLOCK_SIZE)[:, None, None]
    which = torch.arange(classes, device="cuda", dtype=torch.int32)
    available = (own - which + classes - 1).clamp(min=0) // classes
    draw = torch.rand((shape.tokens, shape.kv_heads, classes), device="cuda", generator=generator)
    pick = torch.minimum((draw * available).to(torch.int32), (available - 1).clamp(min=0))
    if sink:
        pick[..., 0] = 0
    last = torch.iinfo(torch.int32).max
    blocks = torch.where(available > 0, which + classes * pick, last)
    blocks = torch.cat([blocks, own.expand(-1, shape.kv_heads, 1)], -1).sort(-1).values
    return torch.where(blocks == last, -1, blocks).to(torch.int32)
