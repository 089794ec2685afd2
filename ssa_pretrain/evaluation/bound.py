"""Theorem 1 of the paper on a trained model: how far the full stream lies from the sparse one, against its bound, by layer.

For a query and head with full attention probabilities p, let m be the mass of the chosen blocks, d = 1 - m the dropped mass,
h_full = sum of p v over all keys, and h_sparse = sum of p v / m over the keys of the chosen blocks. Then

    h_full - h_sparse = sum of p v over dropped keys - d h_sparse,    |h_full - h_sparse| <= d (max |v| over dropped keys + |h_sparse|).

That is Theorem 1 (SSA, arXiv 2511.20102). Everything is computed in fp32 and plain torch from the queries, keys and values of the model's own
forward, before the gate, so a violation would be an error of this file or of the theorem. Means are over the queries whose label counts and that
drop a key, and over heads. The bound is loose if the mean gap is small beside the mean bound. Of single queries the largest ratio of the two is kept;
their mean would say nothing, since a query that drops almost no mass has two numbers that are all rounding.

It costs one more full attention per layer, in chunks of queries. Every rank adds what its own heads, layers, queries and rows give. A method whose
layer does not hand its values to `PackedTokens.observe` cannot be measured.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_kernels import DocumentLayout
from ssa_pretrain.data.rows import HeldOutRows
from ssa_pretrain.evaluation.heads import CHUNK_NUMBERS, attention_chunks
from ssa_pretrain.evaluation.held_out import evaluate_rows
from ssa_pretrain.model.attention import PackedTokens, SSAAttention
from ssa_pretrain.run import Run

SUMS = ("gap", "bound", "dropped_mass", "full_norm", "sparse_norm", "violations")
SLACK = 1e-4  # relative: the fp32 rounding of gap and bound, which is 1e-6 for sums over thousands of keys


def bound_by_layer(run: Run, mode: str, num_rows: int) -> dict[str, Any]:
    """Returns Theorem 1's quantities by layer over some held-out rows; every rank calls it.

    Args:
        run: the model.
        mode: the main stream, which decides the layers' inputs.
        num_rows: rows, spread over the split.
    """
    rows = HeldOutRows(run.manifest, sequence_length=run.config.data.sequence_length, rows=num_rows)
    seen = BoundSums(run)
    evaluate_rows(run, rows, mode, observe=seen.add)
    return {"rows": rows.num_rows, **seen.means()}


class BoundSums:
    """Sums over the observed queries and heads, float64 on the device: [SUMS, layers], the largest ratios [layers] and the counts [layers]."""

    def __init__(self, run: Run) -> None:
        layers, device = run.config.model.num_layers, run.placement.device
        self.sums = torch.zeros(len(SUMS), layers, dtype=torch.float64, device=device)
        self.largest = torch.zeros(layers, dtype=torch.float64, device=device)
        self.count = torch.zeros(layers, dtype=torch.float64, device=device)

    def add(
        self, layer: SSAAttention, q_THD: Tensor, k_SGD: Tensor, packed: PackedTokens, mask_T: Tensor, *, v: Tensor
    ) -> None:
        """Adds one layer's queries; as `PackedTokens.observe`."""
        chosen = layer.select(q_THD, k_SGD, packed.documents)
        sums, largest, count = bound_sums(q_THD, k_SGD, v, chosen, packed.documents, mask_T)
        number = layer.layer_number - 1
        self.sums[:, number] += sums
        self.largest[number] = torch.maximum(self.largest[number], largest)
        self.count[number] += count

    def means(self) -> dict[str, Any]:
        """Returns the means by layer over all ranks under the names of SUMS, `largest_ratio`, and `count`, the queries and heads that drop a key."""
        for sums in (self.sums, self.count):
            dist.all_reduce(sums)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
        means = (self.sums / self.count.clamp(min=1.0)).tolist()
        return {
            **{f"{name}_by_layer": values for name, values in zip(SUMS, means, strict=True)},
            "largest_ratio_by_layer": self.largest.tolist(),
            "count_by_layer": [round(n) for n in self.count.tolist()],
        }


def bound_sums(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, chosen: Tensor, layout: DocumentLayout, mask_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums of SUMS over queries and heads, the largest ratio, and the number of queries and heads that drop a key; float64.

    Args:
        q_THD: queries after RoPE.
        k_SGD: keys after RoPE, of all tokens.
        v_SGD: values.
        chosen: int [T, G or H, N], blocks of the query's document, padded with -1.
        layout: the documents.
        mask_T: 1 for the queries that count, else 0.
    """
    heads, kv_heads = q_THD.shape[1], k_SGD.shape[1]
    v_HSD = v_SGD.transpose(0, 1).repeat_interleave(heads // kv_heads, 0).float()
    norm_HS = v_HSD.norm(dim=-1)
    found = torch.zeros(len(SUMS), dtype=torch.float64, device=q_THD.device)
    largest, count = (torch.zeros((), dtype=torch.float64, device=q_THD.device) for _ in range(2))
    for chunk in attention_chunks(q_THD, k_SGD, chosen, layout, CHUNK_NUMBERS // 2):
        captured = chunk.captured.repeat_interleave(heads // chunk.captured.shape[0], 0)
        dropped = chunk.visible & ~captured
        v, p_chosen = v_HSD[:, chunk.keys], chunk.p * captured
        mass = p_chosen.sum(-1)
        full, sparse = chunk.p @ v, p_chosen @ v / mass[..., None].clamp(min=1e-30)
        lost = (chunk.p * dropped).sum(-1)  # not 1 - mass, which would cancel
        longest = torch.where(dropped, norm_HS[:, None, chunk.keys], 0.0).amax(-1)
        gap, bound = (full - sparse).norm(dim=-1), lost * (longest + sparse.norm(dim=-1))
        rounding = SLACK * bound + 1e-5 * full.norm(dim=-1)
        values = torch.stack([gap, bound, lost, full.norm(dim=-1), sparse.norm(dim=-1), (gap > bound + rounding)])
        counts = dropped.any(-1) * (mask_T[chunk.queries] > 0)
        found += (values * counts).sum((-1, -2), dtype=torch.float64)
        ratio = torch.where(counts & (bound > 1e-4 * full.norm(dim=-1)), gap / bound, 0.0)
        largest = torch.maximum(largest, ratio.max().double())
        count += counts.sum(dtype=torch.float64)
    return found, largest, count
