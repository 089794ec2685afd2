"""Rows of the table for real activations: the locality of their chosen blocks and, on a GPU, the sparse stream's time on them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ssa_kernels import full_attention, select_blocks, sparse_attention
from ssa_kernels.documents import build_layout

from .cases import Row
from .locality import load_activations, shared_fraction, sink_fraction
from .shapes import BLOCK_SIZE, TOP_K
from .timing import median_ms


def activation_rows(path: Path, device: torch.device) -> Iterator[Row]:
    """Yields rho_2, rho_4, rho_8, the share of choices with block 0 and, on a GPU, the time over full attention on the same documents."""
    tensors = load_activations(path, device)
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    layout = build_layout(tensors["cu_seqlens"], num_tokens=k.shape[0], block_size=BLOCK_SIZE)
    common = {"block_size": BLOCK_SIZE, "cu_seqlens": layout}
    indices = select_blocks(q, k, top_k=TOP_K, **common)
    for group in (2, 4, 8):
        detail = f"{1 / group:g} if they choose the same blocks, 1 if they share none"
        yield Row(f"{path.name}: rho_{group}", shared_fraction(indices, layout, group), "", detail=detail)
    yield Row(f"{path.name}: choices that hold block 0", sink_fraction(indices, layout), "")
    if device.type != "cuda":
        return

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention(q, k, v, select_blocks(q, k, top_k=TOP_K, **common), **common)

    ours_ms, full_ms = median_ms(ours), median_ms(lambda: full_attention(q, k, v, cu_seqlens=layout))
    detail = f"{full_ms:.3f} / {ours_ms:.3f} ms, {k.shape[0]} tokens"
    yield Row(f"{path.name}: full / selection + sparse, fwd", full_ms / ours_ms, "x", detail=detail)
