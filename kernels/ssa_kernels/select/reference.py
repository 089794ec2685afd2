"""Block selection in plain PyTorch: the definition of the operator, and the implementation for training on a CPU.

For each query and kv head: the mean key of each block of the document (summed in float32, the last block over its true length, rounded to
the keys' dtype); the importance of each block before the query's own,

    softmax_sum, compressed, official_compat:  sum over the group's heads h of softmax_c(scale q_h . mean_c)
    per_head:                                  scale q_h . mean_c, each query head for itself

then the own block and the top_k - 1 candidates of largest importance; of equal ones, the more recent are taken. Everything is computed in
float32 (float64 for float64 inputs), by chunks of queries over the block rows that they can reach. Importance below float32's smallest
normal number, 2^-126, counts as 0. Source: arXiv 2511.20102, section 3.2; per_head is MoBA's gate (arXiv 2502.13189).

The softmax of softmax_sum is over the earlier blocks. That of compressed also counts the own block once it is complete, which is at the block's last
token: these are the probabilities of NSA's compressed branch (arXiv 2502.11089; branches/), summed over the group. A sum over heads is so weighted by
how much each head looks at earlier blocks at all, which can change the choice.

official_compat reproduces what the official code (github zhenyi4/ssa) returns. That code scans the blocks by chunks of block_size blocks and
keeps half a chunk of the running list. So a block of an earlier chunk must be among the best block_size // 2 of all earlier chunks, and one
of the own chunk among the best block_size // 2 there (the own block included). Its softmax is that of compressed.
"""

import torch

from ..documents import DocumentLayout

QUERIES_PER_CHUNK = 256
TINY = torch.finfo(torch.float32).tiny
COMPLETE_OWN = ("compressed", "official_compat")  # scores whose softmax also counts the own block once that is complete


def select_blocks_reference(
    q: torch.Tensor, k: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices; arguments as in `select_blocks`, with the layout built."""
    means = block_means(k, layout)
    return choose_blocks(q, means, layout=layout, top_k=top_k, scale=scale, score=score)


def block_means(k: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns `[R, G, D]` in k's dtype: the mean key of each block row, 0 in unused ones.

    A decoding cache can hold these means: the mean of a complete block never changes.
    """
    return mean_of_blocks(k.detach(), layout)


def mean_of_blocks(k: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns the same means, differentiable in k."""
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    place = torch.arange(layout.block_size, dtype=torch.int32, device=k.device)
    key = (layout.block_start[:, None] + place).clamp(max=layout.num_tokens - 1)
    inside = place < layout.block_length[:, None]
    total = torch.where(inside[..., None, None], wide[key], 0.0).sum(1)
    return (total / layout.block_length.clamp(min=1)[:, None, None]).to(k.dtype)


def choose_blocks(
    q: torch.Tensor, means: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices int32 `[T, G or H, top_k]` for queries `[T, H, D]` and block means `[R, G, D]`."""
    q, means = q.detach(), means.detach()
    wide = torch.promote_types(q.dtype, torch.float32)
    means = means.to(wide).permute(1, 2, 0)
    chunks = []
    for first in range(0, q.shape[0], QUERIES_PER_CHUNK):
        queries = slice(first, first + QUERIES_PER_CHUNK)
        position = layout.query_position[queries]
        own = position // layout.block_size
        first_block_row = layout.query_first_block_row[queries]
        # Only the block rows of the chunk's documents, up to its last query.
        block_rows = slice(int(first_block_row.min()), int((first_block_row + own).max()) + 1)
        first_block_row = first_block_row - block_rows.start
        counted = (position + 1) // layout.block_size if score in COMPLETE_OWN else own
        ranges = (first_block_row, own, counted)
        importance = _importance(q[queries].to(wide), means[..., block_rows], ranges, scale, score)
        if score == "official_compat":
            importance = _drop_unofficial(importance, first_block_row, own, layout.block_size)
        chunks.append(_top(importance, first_block_row, own, top_k))
    return torch.cat(chunks)


def _importance(
    q: torch.Tensor, means: torch.Tensor, ranges: tuple[torch.Tensor, ...], scale: float, score: str
) -> torch.Tensor:
    """Returns importance [T, G or H, R], -inf unless the block row is a candidate: an earlier block of the query's document.

    Args:
        q: [T, H, D].
        means: [G, D, R].
        ranges: of each query, [T]: the first block row of its document, the number of its candidates, and the number of blocks that the softmax
            counts.
        scale: factor of the logits.
        score: as in `select_blocks`.
    """
    tokens, heads, _ = q.shape
    kv_heads, _, num_block_rows = means.shape
    first, own, counted = (x[:, None] for x in ranges)
    block_row = torch.arange(num_block_rows, device=q.device)
    earlier = (block_row >= first) & (block_row < first + own)
    in_softmax = (block_row >= first) & (block_row < first + counted)
    per_kv_head = q.view(tokens, kv_heads, heads // kv_heads, -1).transpose(0, 1).reshape(kv_heads, -1, q.shape[-1])
    logits = (per_kv_head @ means * scale).view(kv_heads, tokens, heads // kv_heads, num_block_rows).transpose(0, 1)
    logits = logits.masked_fill(~in_softmax[:, None, None], float("-inf"))
    if score == "per_head":
        return logits.reshape(tokens, heads, num_block_rows)
    # Without any candidate the softmax is NaN; those queries are masked again below.
    importance = logits.softmax(-1).sum(2)
    importance = torch.where(importance < TINY, 0.0, importance)
    return importance.masked_fill(~earlier[:, None], float("-inf"))


def _top(importance: torch.Tensor, first_block_row: torch.Tensor, own: torch.Tensor, top_k: int):
    """Returns int32 [T, G or H, top_k]: the best top_k - 1 candidates and the own block, ascending, padded with -1."""
    tokens, lists, num_block_rows = importance.shape
    take = min(top_k - 1, num_block_rows)
    # A stable descending sort of the block rows in reverse order puts the more recent of equals first.
    order = importance.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :take]
    block_row = num_block_rows - 1 - order
    taken = importance.gather(-1, block_row) > float("-inf")
    absent = torch.iinfo(torch.int32).max
    block = torch.where(taken, block_row - first_block_row[:, None, None], absent)
    chosen = torch.full((tokens, lists, top_k), absent, dtype=torch.int64, device=importance.device)
    chosen[..., :take] = block
    chosen[..., -1] = own[:, None]
    chosen = chosen.sort(-1).values
    return torch.where(chosen == absent, -1, chosen).to(torch.int32)


def _drop_unofficial(importance: torch.Tensor, first_block_row: torch.Tensor, own: torch.Tensor, block_size: int):
    """Returns importance with -inf at the blocks that the official code's merge loses."""
    num_block_rows = importance.shape[-1]
    block = torch.arange(num_block_rows, device=importance.device) - first_block_row[:, None]
    chunk_start = (own // block_size * block_size)[:, None]
    before = (block < chunk_start)[:, None]
    half = block_size // 2
    keep_before = _best(importance.masked_fill(~before, float("-inf")), half)
    keep_inside = _best(importance.masked_fill(before, float("-inf")), half - 1)
    first_chunk = (chunk_start == 0)[:, None]
    return importance.masked_fill(~(first_chunk | keep_before | keep_inside), float("-inf"))


def _best(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Returns bool [T, G, R]: the `count` largest, the more recent of equals."""
    order = importance.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    keep = torch.zeros_like(importance, dtype=torch.bool)
    # If there are fewer than `count` candidates, the order also holds block rows that are none.
    return keep.scatter_(-1, importance.shape[-1] - 1 - order, True) & (importance > float("-inf"))
