"""Microbatches: rows laid end to end as one packed sequence with its document boundaries.

A microbatch is `micro_batch_size` rows of L tokens, T = micro_batch_size * L tokens in all. Every row begins a document (what went before is not
visible), positions restart at each, and the label of a document's last token, which is the next document's first, is masked.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ssa_pretrain.data.rows import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch.

    Attributes:
        index: its place in the global batch, from 0.
        tokens: int64 [1, T].
        labels: int64 [1, T], the following tokens.
        loss_mask: float32 [1, T], 0 where the label belongs to another document.
        positions: int64 [T].
        cu_seqlens: int32 [documents + 1], from 0 to T.
        num_rows: rows of the microbatch if each is one document, else None.
    """

    index: int
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_rows: int | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; a GPU takes it from pinned memory, in the order of its work, without anyone waiting."""
        names = ("tokens", "labels", "loss_mask", "positions", "cu_seqlens")
        tensors = {name: getattr(self, name) for name in names}
        if device.type == "cuda":
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


def collate(rows: Iterable[Row], *, index: int, isolate_documents: bool = True) -> Batch:
    """Return the microbatch of some rows.

    Args:
        rows: each L + 1 tokens with their document starts.
        index: the microbatch's place in the global batch.
        isolate_documents: False makes each row one document.
    """
    tokens, labels, masks, starts = [], [], [], []
    for row in rows:
        start = row.starts.copy() if isolate_documents else np.zeros_like(row.starts)
        mask = ~start[1:]
        if row.padding:
            mask[-row.padding :] = False
        masks.append(mask)
        start[0] = True
        starts.append(start[:-1])
        tokens.append(row.tokens[:-1])
        labels.append(row.tokens[1:])
    begin = np.flatnonzero(np.concatenate(starts))
    total = sum(len(t) for t in tokens)
    lengths = np.diff(np.append(begin, total))
    positions = np.arange(total) - np.repeat(begin, lengths)
    return Batch(
        index=index,
        tokens=torch.from_numpy(np.concatenate(tokens)).unsqueeze(0),
        labels=torch.from_numpy(np.concatenate(labels)).unsqueeze(0),
        loss_mask=torch.from_numpy(np.concatenate(masks).astype(np.float32)).unsqueeze(0),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.append(begin, total).astype(np.int32)),
        num_rows=len(tokens) if len(begin) == len(tokens) else None,
    )
