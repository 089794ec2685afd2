"""SSA in float64 by loops and dense masks: written from the definition, sharing nothing with the package that it checks.

Definition (arXiv 2511.20102): per document, blocks of K keys counted from its first token; the mean of each block's keys, rounded to
the keys' dtype; a query's importance of an earlier block is the sum over its group's heads of the softmax over earlier blocks of
scale q . mean; chosen are the own block and the top_k - 1 most important earlier ones, the more recent first among equals.
"""

import math
from itertools import pairwise

import torch


def document_spans(cu_seqlens, num_tokens):
    """Returns [(start, end)] of all documents; tokens past the last boundary are one more."""
    bounds = [int(x) for x in cu_seqlens] + [num_tokens]
    return [(a, b) for a, b in pairwise(bounds) if b > a]


def where(cu_seqlens, num_tokens):
    """Returns (start, end) of each token's document."""
    return [(a, b) for a, b in document_spans(cu_seqlens, num_tokens) for _ in range(a, b)]


def importance(q, k, cu_seqlens, block_size, scale, score):
    """Returns per token and list (kv heads, or query heads for per_head) {earlier block: importance}.

    The softmax of NSA's compressed branch, and of the official code, also counts the own block, at the block's last token.
    """
    tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    found = []
    for token, (start, end) in enumerate(where(cu_seqlens, tokens)):
        own = (token - start) // block_size
        complete = score in ("compressed", "official_compat")
        counted = own + (complete and (token - start + 1) % block_size == 0)
        logits = [[0.0] * counted for _ in range(heads)]
        for head in range(heads):
            for block in range(counted):
                first = start + block * block_size
                mean = k[first : min(first + block_size, end), head // group].double().mean(0).to(k.dtype).double()
                logits[head][block] = float(q[token, head].double() @ mean) * scale
        if score == "per_head":
            found.append([dict(enumerate(row)) for row in logits])
            continue
        per_group = []
        for kv_head in range(kv_heads):
            total = dict.fromkeys(range(own), 0.0)
            for head in range(kv_head * group, (kv_head + 1) * group):
                top = max(logits[head], default=0.0)
                norm = sum(math.exp(x - top) for x in logits[head])
                for block in range(own):
                    total[block] += math.exp(logits[head][block] - top) / norm
            per_group.append(total)
        found.append(per_group)
    return found


def best(candidates, count):
    """Returns the `count` most important blocks of {block: importance}; of equal ones, the more recent."""
    return sorted(candidates, key=lambda block: (-candidates[block], -block))[: max(count, 0)]


def official_candidates(candidates, own, block_size):
    """Returns the part of {block: importance} that the official code keeps: half a chunk of all earlier chunks, half of the own one."""
    chunk_start = own // block_size * block_size
    if chunk_start == 0:
        return candidates
    before = {c: x for c, x in candidates.items() if c < chunk_start}
    inside = {c: x for c, x in candidates.items() if c >= chunk_start}
    kept = set(best(before, block_size // 2)) | set(best(inside, block_size // 2 - 1))
    return {c: x for c, x in candidates.items() if c in kept}


def select(q, k, cu_seqlens, block_size, top_k, scale, score="softmax_sum"):
    """Returns int32 [T, lists, top_k]: ascending block numbers, padded with -1."""
    tokens = q.shape[0]
    rows = []
    spans = where(cu_seqlens, tokens)
    for token, lists in enumerate(importance(q, k, cu_seqlens, block_size, scale, score)):
        own = (token - spans[token][0]) // block_size
        chosen = []
        for candidates in lists:
            if score == "official_compat":
                candidates = official_candidates(candidates, own, block_size)
            blocks = sorted([*best(candidates, top_k - 1), own])
            chosen.append(blocks + [-1] * (top_k - len(blocks)))
        rows.append(chosen)
    return torch.tensor(rows, dtype=torch.int32)


def check_selection(indices, q, k, cu_seqlens, block_size, top_k, scale, score="softmax_sum", tolerance=1e-5):
    """Fails unless `indices` are a correct choice: form, count, own block, and no unchosen block that is clearly more important."""
    tokens = q.shape[0]
    spans = where(cu_seqlens, tokens)
    for token, lists in enumerate(importance(q, k, cu_seqlens, block_size, scale, score)):
        own = (token - spans[token][0]) // block_size
        for row, candidates in zip(indices[token].tolist(), lists, strict=True):
            if score == "official_compat":
                candidates = official_candidates(candidates, own, block_size)
            count = min(top_k, len(candidates) + 1)
            blocks = row[:count]
            assert row[count:] == [-1] * (top_k - count), (token, row)
            assert blocks == sorted(set(blocks)), (token, row)
            assert blocks[-1] == own, (token, row)
            chosen = [candidates[block] for block in blocks[:-1]]
            left = [candidates[block] for block in set(candidates) - set(blocks)]
            if chosen and left:
                slack = tolerance * max(abs(x) for x in chosen + left)
                assert min(chosen) >= max(left) - slack, (token, row, min(chosen), max(left))


def visible(indices, cu_seqlens, num_tokens, num_heads, block_size):
    """Returns bool [H, T, T]: whether a head's query may attend to a key. With `indices` None: every earlier key of the document."""
    spans = where(cu_seqlens, num_tokens)
    mask = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.bool)
    for token, (start, _) in enumerate(spans):
        for head in range(num_heads):
            if indices is None:
                mask[head, token, start : token + 1] = True
                continue
            lists = indices.shape[1]
            for block in indices[token, head * lists // num_heads].tolist():
                if block >= 0:
                    first = start + block * block_size
                    mask[head, token, first : min(first + block_size, token + 1)] = True
    return mask


def attention(q, k, v, mask, scale):
    """Returns (o [T, H, D], lse [T, H]) in float64 of attention under `mask` [H, T, T]; differentiable."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(q.shape[1]):
        logits = (q[:, head].double() @ k[:, head // group].double().T) * scale
        logits = torch.where(mask[head], logits, -math.inf)
        lse = torch.logsumexp(logits, -1)
        outs.append(torch.exp(logits - lse[:, None]) @ v[:, head // group].double())
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses, 1).detach()


def gate_and_align(o_full, o_sparse, gate_logits, main, weights, grad_out, grad_loss):
    """Returns (out, loss, d o_full, d o_sparse, d gate_logits), every derivative by its formula."""
    a, b, z = o_full.double(), o_sparse.double(), gate_logits.double()[..., None]
    g = 1 / (1 + torch.exp(-z))
    f, s, n = g * a, g * b, a.numel()
    d = f - s
    loss = torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5).sum() / n * (weights[0] + weights[1])
    pull = d.clamp(-1, 1) / n * grad_loss
    df, ds = weights[0] * pull, -weights[1] * pull
    if main == "full":
        df = df + grad_out
    else:
        ds = ds + grad_out
    dz = ((df * a + ds * b) * g * (1 - g)).sum(-1)
    return (f if main == "full" else s), loss, df * g, ds * g, dz
