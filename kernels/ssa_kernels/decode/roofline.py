"""The bytes that a decoding step has to read and write: the floor of its time is this number over the memory's bandwidth.

Each byte counts once: the queries and outputs, the numbers of pages or keys, and in full mode all keys and values of the sequence; in sparse mode the
means of the blocks before the query's own, and the keys and values of the chosen blocks up to the query. Several new tokens of a sequence
share its keys and its means; their chosen blocks are counted as if they all differed, so for them it is an upper bound. What a kernel writes for
itself and reads again (logits of the means, partial sums) is not counted: it need not leave the L2.
"""

from collections.abc import Sequence

import torch

from ..checks import check_whole
from .cache import KeyValueCache


def decode_bytes(q: torch.Tensor, cache: KeyValueCache, lengths: Sequence[int], *, top_k: int | None) -> int:
    """Returns the bytes that `decode_attention` of these queries must move.

    Args:
        q: `[B, T, H, D]`, only its shape and dtype.
        cache: the layer's cache, only its shapes and dtype.
        lengths: the sequences' lengths as numbers, which the host may not know from `cache.seq_lens` without waiting.
        top_k: blocks per query, or None for full attention.

    Raises:
        ValueError: for a top_k below 1 and for lengths that are not one per sequence.
    """
    if top_k is not None:
        check_whole("top_k", top_k, least=1)
    if len(lengths) != len(q):
        raise ValueError(f"lengths of {len(lengths)} sequences must be those of q's {len(q)}")
    tokens, size = q.shape[1], cache.block_size
    vector = cache.k.shape[2] * cache.k.shape[3] * cache.k.element_size()  # one key, value or mean of all kv heads
    total = 2 * q.numel() * q.element_size()
    for length in lengths:
        blocks = -(-length // size)
        read = keys = 0
        if top_k is None:
            keys, read = length, blocks
        else:
            for position in range(max(length - tokens, 0), length):
                own = position // size
                keys += min(top_k - 1, own) * size + position % size + 1
                read += min(top_k, own + 1)
            if blocks > top_k:  # else all blocks are chosen without a look at their means
                total += (length - 1) // size * vector
                read += (length - 1) // size
        total += 2 * keys * vector
        total += read * 4 if cache.page_table is not None else 0
        total += keys * 4 if cache.key_table is not None else 0
    return total
