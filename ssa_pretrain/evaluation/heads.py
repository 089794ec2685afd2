"""What the attention of each layer and head looks at: the mass that the chosen blocks capture, and the entropy of full attention.

With p the probabilities of full causal attention over a query's document,

    captured mass = sum of p over the keys of the query's chosen blocks,    entropy = -sum of p log p, nats,

both averaged over the queries whose label counts. These are the paper's two diagnostics (SSA, arXiv 2511.20102). The probabilities are computed from
the queries and keys of the model's own forward, in fp32 and in plain torch, on any device. In sparse mode the layers' inputs are those of sparse
attention; p is still that of full attention over them.

Cost: the attention is computed once more, in chunks of queries, each at most CHUNK_NUMBERS logits. So a few rows are enough, and a long row needs no
more memory than a short one. Every rank adds what its own heads, layers, queries and rows give.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import DocumentLayout
from ssa_pretrain.data.rows import HeldOutRows
from ssa_pretrain.evaluation.held_out import evaluate_rows
from ssa_pretrain.model.attention import PackedTokens, SSAAttention
from ssa_pretrain.run import Run

CHUNK_NUMBERS = 2**25  # logits in memory at once: 128 MB in fp32, and a few times that with what is computed from them


def attention_by_head(run: Run, mode: str, num_rows: int) -> dict[str, Any]:
    """Returns the captured mass and the entropy of full attention by layer and head, over some held-out rows; every rank calls it.

    Args:
        run: the model.
        mode: the main stream.
        num_rows: rows, spread over the split.
    """
    length = run.config.data.sequence_length
    rows = HeldOutRows(run.manifest, sequence_length=length, rows=num_rows)
    seen = HeadSums(run)
    evaluate_rows(run, rows, mode, observe=seen.add)
    mass, entropy, count = seen.means()
    return {"rows": rows.num_rows, "queries": count, "captured_mass_by_head": mass, "entropy_by_head": entropy}


def entropy_by_layer(run: Run, mode: str, num_rows: int) -> list[float]:
    """Returns the entropy of full attention by layer, a mean over heads, over some held-out rows; every rank calls it."""
    found = attention_by_head(run, mode, num_rows)["entropy_by_head"]
    return [sum(heads) / len(heads) for heads in found]


class HeadSums:
    """Sums over the observed queries, float64 on the device: [captured mass or entropy, layers, H], and the queries per layer."""

    def __init__(self, run: Run) -> None:
        model, device = run.config.model, run.placement.device
        self.sums = torch.zeros(2, model.num_layers, model.num_attention_heads, dtype=torch.float64, device=device)
        self.queries = torch.zeros(model.num_layers, dtype=torch.float64, device=device)
        self._tp, self._tp_rank = run.config.parallel.tp, run.placement.tp_rank

    def add(
        self, layer: SSAAttention, q_THD: Tensor, k_SGD: Tensor, packed: PackedTokens, mask_T: Tensor, **_: Tensor
    ) -> None:
        """Adds one layer's queries; as `PackedTokens.observe`, without the values."""
        chosen = layer.select(q_THD, k_SGD, packed.documents)
        found = head_sums(q_THD, k_SGD, chosen, packed.documents, mask_T)
        heads, number = q_THD.shape[1], layer.layer_number - 1
        own = slice(self._tp_rank * heads, (self._tp_rank + 1) * heads)
        self.sums[:, number, own] += found
        self.queries[number] += mask_T.sum(dtype=torch.float64)

    def means(self) -> tuple[list[list[float]], list[list[float]], int]:
        """Returns the means [layers][H] of captured mass and of entropy over all ranks, and the number of queries."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.queries)
        queries = self.queries / self._tp
        mass, entropy = (self.sums / queries[:, None].clamp(min=1.0)).tolist()
        return mass, entropy, round(float(queries.max()))


def head_sums(q_THD: Tensor, k_SGD: Tensor, chosen: Tensor, layout: DocumentLayout, mask_T: Tensor) -> Tensor:
    """Returns the sums over queries of captured mass and entropy by head, float64 [2, H].

    Args:
        q_THD: queries after RoPE.
        k_SGD: keys after RoPE, of all tokens.
        chosen: int [T, G or H, N], blocks of the query's document, padded with -1.
        layout: the documents.
        mask_T: 1 for the queries that count, else 0.
    """
    heads = q_THD.shape[1]
    sums = torch.zeros(2, heads, dtype=torch.float64, device=q_THD.device)
    for chunk in attention_chunks(q_THD, k_SGD, chosen, layout):
        captured = chunk.captured.repeat_interleave(heads // chunk.captured.shape[0], 0)
        log_p = chunk.log_p.masked_fill(~chunk.visible, 0.0)
        by_query = torch.stack([(chunk.p * captured).sum(-1), -(chunk.p * log_p).sum(-1)])
        sums += (by_query * mask_T[chunk.queries]).sum(-1, dtype=torch.float64)
    return sums


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Full attention of some queries over the keys that at least one of them sees.

    Attributes:
        queries: which, of all queries.
        keys: which, of all keys.
        log_p: fp32 [H, queries, keys], logarithm of the probabilities; -inf where a key is not visible.
        p: fp32 [H, queries, keys], the probabilities.
        visible: bool [queries, keys]: the key is in the query's document, and not after it.
        captured: bool [G or H, queries, keys]: it is visible, and in one of the query's chosen blocks.
    """

    queries: slice
    keys: slice
    log_p: Tensor
    p: Tensor
    visible: Tensor
    captured: Tensor


def attention_chunks(
    q_THD: Tensor, k_SGD: Tensor, chosen: Tensor, layout: DocumentLayout, numbers: int = 0
) -> Iterator[AttentionChunk]:
    """Yields full attention in fp32, in chunks of queries of at most `numbers` logits, by default CHUNK_NUMBERS; arguments as in `head_sums`."""
    num_queries, heads, dim = q_THD.shape
    k_HSD = k_SGD.transpose(0, 1).repeat_interleave(heads // k_SGD.shape[1], 0).float()
    step = max(1, (numbers or CHUNK_NUMBERS) // (heads * k_SGD.shape[0]))
    for first in range(0, num_queries, step):
        queries = slice(first, min(first + step, num_queries))
        start = layout.query_start[queries].long()
        own = start + layout.query_position[queries].long()
        keys = slice(int(start.min()), int(own.max()) + 1)
        number = torch.arange(keys.start, keys.stop, device=q_THD.device)
        visible = (number >= start[:, None]) & (number <= own[:, None])
        logits = q_THD[queries].transpose(0, 1).float() @ k_HSD[:, keys].transpose(1, 2) * dim**-0.5
        log_p = logits.masked_fill(~visible, float("-inf")).log_softmax(-1)
        captured = _in_chosen_blocks(chosen[queries], number - start[:, None], visible, layout.block_size)
        yield AttentionChunk(queries, keys, log_p, log_p.exp(), visible, captured)


def _in_chosen_blocks(chosen: Tensor, offset: Tensor, visible: Tensor, block_size: int) -> Tensor:
    """Returns whether each key lies in one of its query's chosen blocks, bool [G or H, queries, keys].

    Args:
        chosen: [queries, G or H, N].
        offset: [queries, keys], the key's position in the query's document; meaningless where it is not visible.
        visible: [queries, keys].
        block_size: keys per block.
    """
    block = torch.where(visible, offset, 0) // block_size
    num_blocks = int(block.max()) + 1
    table = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    table.scatter_(2, torch.where(chosen < 0, num_blocks, chosen).long(), True)
    taken = table.transpose(0, 1).gather(2, block.expand(chosen.shape[1], -1, -1))
    return taken & visible
