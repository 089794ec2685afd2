"""Microbatches: concatenated rows as one packed sequence with its document boundaries.

A microbatch is `micro_batch_size` rows of L tokens, T = micro_batch_size * L tokens in all. Every row begins a
document, so earlier tokens are not visible. Positions restart at each document. The label of a document's last token is
the next document's first token, so it is masked.

Padding has no loss. Its labels are masked, and it is cut into documents so short that the chosen blocks cover each of
them. There full and sparse attention are equal, the alignment loss is 0 and the captured mass is 1. The engine leaves
padding out of the number of tokens that it divides by.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ssa_pretrain.data.rows import HeldOutRows, Row, TrainingRows
from ssa_pretrain.data.spans import Span, total

PADDING_DOCUMENT = 16  # the smallest block size: any choice of blocks covers it


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch.

    Attributes:
        index: its index in the global batch, from 0.
        tokens: int64 [1, T].
        labels: int64 [1, T], the following tokens.
        loss_mask: float32 [1, T], 0 where the label belongs to another document.
        positions: int64 [T].
        cu_seqlens: int32 [documents + 1], from 0 to T.
        num_rows: rows of the whole microbatch if each row is one document, else None.
        padding: (first token, number of tokens) of each span of padding, ascending.
        boundaries: the values of `cu_seqlens` on the host; kept by copies on a device, so that nobody waits for it.
    """

    index: int
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_rows: int | None = None
    padding: tuple[Span, ...] = ()
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.boundaries:
            object.__setattr__(self, "boundaries", tuple(self.cu_seqlens.tolist()))

    @property
    def num_padding(self) -> int:
        """How many of the T tokens are padding."""
        return total(self.padding)

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device. A GPU copies it from pinned memory asynchronously, in stream order."""
        names = ("tokens", "labels", "loss_mask", "positions", "cu_seqlens")
        tensors = {name: getattr(self, name) for name in names}
        if device.type == "cuda":
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


def collate(
    rows: Iterable[Row], *, index: int, isolate_documents: bool = True, padding_document: int = PADDING_DOCUMENT
) -> Batch:
    """Returns the microbatch of some rows.

    Args:
        rows: each L + 1 tokens with their document starts.
        index: the microbatch's index in the global batch.
        isolate_documents: False: each row is one document, except for its padding.
        padding_document: tokens per document of padding, at most top_k * block_size.
    """
    tokens, labels, masks, starts, padding = [], [], [], [], []
    for row in rows:
        start = row.starts.copy() if isolate_documents else np.zeros_like(row.starts)
        if row.padding:
            start[-row.padding :: padding_document] = True
        mask = ~start[1:]
        if row.padding:
            mask[-row.padding :] = False
        if row.padding > 1:  # the last token of a row is only a label
            end = sum(map(len, tokens)) + len(row.tokens) - 1
            padding.append((end - row.padding + 1, row.padding - 1))
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
        padding=tuple(padding),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How rows become microbatches.

    Attributes:
        micro_batch_size: rows per microbatch.
        isolate_documents: whether documents of a row attend only to themselves.
        padding_document: longest document of padding, in tokens.
    """

    micro_batch_size: int
    isolate_documents: bool
    padding_document: int

    def microbatch(self, rows: TrainingRows | HeldOutRows, number: int, *, index: int) -> Batch:
        """Returns microbatch `number` of a sequence of rows; `index` is its place in the global batch."""
        size = self.micro_batch_size
        return collate(
            (rows.row(number * size + i) for i in range(size)),
            index=index,
            isolate_documents=self.isolate_documents,
            padding_document=self.padding_document,
        )


def training_batches(
    rows: TrainingRows, packing: Packing, step: int, *, count: int, dp: int, dp_rank: int
) -> list[Batch]:
    """Returns the microbatches of a step on one data rank: every dp-th of the global batch.

    Args:
        rows: the rows of the run.
        packing: how they become microbatches.
        step: the optimizer step, from 0.
        count: microbatches per data rank.
        dp: data ranks.
        dp_rank: this data rank.
    """
    per_step = count * dp
    return [packing.microbatch(rows, step * per_step + i, index=i) for i in range(dp_rank, per_step, dp)]
