"""Locality of chosen blocks: how much neighbouring tokens share, on real activations or synthetic choices.

rho_n = (distinct blocks that n consecutive tokens chose) / (their number of choices): 1 if they share none, 1/n if they all choose the same.
Union tiles over 4 tokens pay off below about 0.55 in the forward and below about 0.4 in dQ (a prototype on an H200), so rho decides the
tile. A group counts only if it lies in one document and each of its tokens chose top_k blocks.
"""

from pathlib import Path

import numpy as np
import torch

from ssa_kernels.documents import DocumentLayout


def shared_fraction(indices: torch.Tensor, layout: DocumentLayout, group: int) -> float:
    """Returns rho for groups of `group` consecutive tokens. indices: int32 [tokens, kv heads, top_k], -1 padded at the end."""
    tokens = indices.shape[0] // group * group
    starts = layout.query_start[:tokens].view(-1, group)
    together = starts[:, 0] == starts[:, -1]
    chosen = (
        indices[:tokens].view(-1, group, *indices.shape[1:]).transpose(1, 2).flatten(2)
    )  # [groups, kv heads, group * top_k]
    chosen = chosen[together[:, None] & (chosen >= 0).all(-1)]
    if len(chosen) == 0:
        return float("nan")
    ordered = chosen.sort(-1).values
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
    return float(distinct.double().mean() / chosen.shape[-1])


def sink_fraction(indices: torch.Tensor, layout: DocumentLayout) -> float:
    """Returns the share of full choices that include block 0 of their document. Queries inside block 0 do not count."""
    away = (layout.query_position >= layout.block_size)[:, None] & (indices[..., -1] >= 0)
    return float((indices[..., 0] == 0)[away].double().mean())


def load_activations(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns q [tokens, H, D], k and v [tokens, G, D] in bf16 and cu_seqlens from a .pt or .npz file with those names."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    missing = {"q", "k", "v", "cu_seqlens"} - tensors.keys()
    if missing:
        raise ValueError(f"activations={path} must hold q, k, v and cu_seqlens; it lacks {', '.join(sorted(missing))}")
    moved = {name: tensors[name].to(device, torch.bfloat16) for name in ("q", "k", "v")}
    return {**moved, "cu_seqlens": tensors["cu_seqlens"].to(device, torch.int32)}
