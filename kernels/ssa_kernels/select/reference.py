"""Block selection in plain PyTorch: what the kernels must compute, and what training on a CPU runs.

For each query and kv head: block means of the keys over each block of the document (summed in float32, the last block over its true
length, rounded to the keys' dtype); importance of each block before the query's own,

    softmax_sum, official_compat:  sum over the group's heads h of softmax_c(scale q_h . mean_c)
    per_head:                      scale q_h . mean_c, each query head for itself

then the own block and the top_k - 1 candidates of largest importance, equal ones decided for the more recent. Everything in float32
(float64 for float64 inputs), where importance below float32's smallest normal number, 2^-126, is none; by chunks of queries over the
block rows that they can reach. Source: arXiv 2511.20102, section 3.2;
per_head is MoBA's gate (arXiv 2502.13189).

official_compat reproduces what the official code (github zhenyi4/ssa) returns: it scans the blocks by chunks of block_size blocks and
keeps half a chunk of the running list, so a block of an earlier chunk must be among the best block_size // 2 of all earlier chunks,
and one of the own chunk among the best block_size // 2 there (the own block included). Its softmax also counts the own block when
that is complete; that scaling is not reproduced.
"""

import torch

from ..documents import DocumentLayout

QUERIES_PER_CHUNK = 256
TINY = torch.finfo(torch.float32).tiny


def select_blocks_reference(
    q: torch.Tensor, k: torch.Tensor, *, layout: DocumentLayout, top_k: int, scale: float, score: str
) -> torch.Tensor:
    """Returns indices; arguments as in `select_blocks`, with the layout built."""
    means = block_means(k, layout)
    return choose_blocks(q, means, layout=layout, top_k=top_k, scale=scale, score=score)


def block_means(k: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """Returns `[R, G, D]` in k's dtype: the mean key of each block row, 0 in unused rows.

    A decoding cache may hold these numbers: a finished block's mean never changes.
    """
    k = k.detach()
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
        own = layout.query_position[queries] // layout.block_size
        first_row = layout.query_first_block_row[queries]
        # Only the block rows of the chunk's documents, up to its last query.
        rows = slice(int(first_row.min()), int((first_row + own).max()) + 1)
        first_row = first_row - rows.start
        importance = _importance(q[queries].to(wide), means[..., rows], first_row, own, scale, score)
        if score == "official_compat":
            importance = _drop_unofficial(importance, first_row, own, layout.block_size)
        chunks.append(_top(importance, first_row, own, top_k))
    return torch.cat(chunks)


def _importance(
    q: torch.Tensor, means: torch.Tensor, first_row: torch.Tensor, own: torch.Tensor, scale: float, score: str
):
    """Importance [T, G or H, R], -inf where a row is no candidate (an earlier block of the query's document)."""
    tokens, heads, _ = q.shape
    groups, _, rows = means.shape
    row = torch.arange(rows, device=q.device)
    earlier = (row >= first_row[:, None]) & (row < (first_row + own)[:, None])
    per_group = q.view(tokens, groups, heads // groups, -1).transpose(0, 1).reshape(groups, -1, q.shape[-1])
    logits = (per_group @ means * scale).view(groups, tokens, heads // groups, rows).transpose(0, 1)
    logits = logits.masked_fill(~earlier[:, None, None], float("-inf"))
    if score == "per_head":
        return logits.reshape(tokens, heads, rows)
    # Without any candidate softmax is NaN; those rows are masked again below.
    importance = logits.softmax(-1).sum(2)
    importance = torch.where(importance < TINY, 0.0, importance)
    return importance.masked_fill(~earlier[:, None], float("-inf"))


def _top(importance: torch.Tensor, first_row: torch.Tensor, own: torch.Tensor, top_k: int):
    """The best top_k - 1 candidates and the own block, ascending, -1 padded: int32 [T, G or H, top_k]."""
    tokens, lists, rows = importance.shape
    take = min(top_k - 1, rows)
    # A stable descending sort of the rows in reverse keeps the more recent of equals first.
    order = importance.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :take]
    row = rows - 1 - order
    taken = importance.gather(-1, row) > float("-inf")
    absent = torch.iinfo(torch.int32).max
    block = torch.where(taken, row - first_row[:, None, None], absent)
    chosen = torch.full((tokens, lists, top_k), absent, dtype=torch.int64, device=importance.device)
    chosen[..., :take] = block
    chosen[..., -1] = own[:, None]
    chosen = chosen.sort(-1).values
    return torch.where(chosen == absent, -1, chosen).to(torch.int32)


def _drop_unofficial(importance: torch.Tensor, first_row: torch.Tensor, own: torch.Tensor, block_size: int):
    """Importance with -inf at the blocks that the official code's merge loses."""
    rows = importance.shape[-1]
    block = torch.arange(rows, device=importance.device) - first_row[:, None]
    chunk_start = (own // block_size * block_size)[:, None]
    before = (block < chunk_start)[:, None]
    half = block_size // 2
    keep_before = _best(importance.masked_fill(~before, float("-inf")), half)
    keep_inside = _best(importance.masked_fill(before, float("-inf")), half - 1)
    first_chunk = (chunk_start == 0)[:, None]
    return importance.masked_fill(~(first_chunk | keep_before | keep_inside), float("-inf"))


def _best(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [T, G, R]: the `count` largest, the more recent of equals."""
    order = importance.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    keep = torch.zeros_like(importance, dtype=torch.bool)
    # Fewer than `count` there: what fills up the order is no candidate.
    return keep.scatter_(-1, importance.shape[-1] - 1 - order, True) & (importance > float("-inf"))
