"""The sums of one pass over a rank's microbatches, which step.py normalises and reduces over ranks. Nothing here waits for the device.

A microbatch's loss that is not finite makes its gradients NaN (`StepSums.loss`), so the gradient norm, which all ranks share, tells every rank whether
to skip the step.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.part_sums import PartSums
from ssa_pretrain.model.attention import PackedTokens


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts over the global batch, float64 scalars on the device.

    Attributes:
        labels: labels that count.
        tokens: tokens other than padding.
        drawn: of these, the queries that alignment and captured mass are means over, by weight.
    """

    labels: Tensor
    tokens: Tensor
    drawn: Tensor


@dataclass(slots=True)
class StepSums:
    """The sums and packings of one pass over this rank's microbatches.

    Attributes:
        counts: of the global batch.
        loss_scale: factor of a microbatch's sum of cross entropies in its loss.
        packed: every microbatch's packing, with its layers' diagnostics.
        cross_entropies: every microbatch's sum; on the last stage only.
        by_position: float64 [2, buckets], sums of cross entropies and labels by position (`EvaluationResult`); None: not counted.
        full: sum and number of labels of every microbatch whose main stream is the full one; on the last stage only.
        z_losses: every microbatch's sum of z-losses; on the last stage only, empty without a z-loss.
        parts: the sums by part of the corpus.
    """

    counts: Counts
    loss_scale: float | Tensor = 1.0
    packed: list[PackedTokens] = field(default_factory=list)
    cross_entropies: list[Tensor] = field(default_factory=list)
    by_position: Tensor | None = None
    full: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    z_losses: list[Tensor] = field(default_factory=list)
    parts: PartSums = field(default_factory=PartSums)

    def loss(self, losses: Tensor, batch: Batch, main: str) -> Tensor:
        """Returns a localised microbatch's loss from its tokens' cross entropies, and keeps their sum. A loss that is not finite has NaN gradients.

        Args:
            losses: the tokens' cross entropies [1, T]; with a z-loss [2, T], their sums with the z-losses and these by themselves.
            batch: the microbatch.
            main: its main stream.
        """
        masked = losses[:1].float() * batch.loss_mask
        total = masked.sum()
        kept = total.detach()
        if len(losses) > 1:
            z_losses = losses[1:].detach() * batch.loss_mask
            self.z_losses.append(z_losses.sum())
            kept, masked = kept - self.z_losses[-1], masked.detach() - z_losses
        self.cross_entropies.append(kept)
        if main == "full":
            self.full.append((kept, batch.loss_mask.sum()))
        self.parts.add(masked, batch)
        if self.by_position is not None:
            edges = 2 ** torch.arange(self.by_position.shape[1] - 1, device=losses.device)
            bucket = torch.bucketize(batch.positions, edges, right=True)
            self.by_position.index_add_(1, bucket, torch.cat([masked, batch.loss_mask]).detach().double())
        one_or_nan = torch.where(kept.isfinite(), 1.0, torch.nan)
        return total * self.loss_scale * one_or_nan
