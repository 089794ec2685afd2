"""Averages weights of several checkpoints (a model soup): tensor by tensor in fp64, from common weights to common weights.

Only one tensor of each checkpoint is in memory at a time, and whole files are written as they fill up (weights.py). The result is

    sum over checkpoints of share * weight,   the shares add up to 1,

rounded once, to the format of the result.

Source: averaging checkpoints along a run, arXiv 2306.03241 (LAWA); model soups, arXiv 2203.05482.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ssa_pretrain.checkpoint.weights import WeightsReader, WeightsWriter, write_index
from ssa_pretrain.errors import WeightsError


def average(sources: Sequence[WeightsReader], shares: Sequence[float], target: Path, dtype: torch.dtype) -> None:
    """Writes the average of common weights into a new folder.

    Args:
        sources: the weights; all hold the same tensors.
        shares: of each; their sum does not matter.
        target: does not exist.
        dtype: of the result.

    Raises:
        WeightsError: the sources hold different models.
    """
    shapes = {name: tuple(entry["shape"]) for name, entry in sources[0].tensors.items()}
    for source in sources[1:]:
        source.require(shapes, exact=True)
    whole = sum(shares)
    target.mkdir()
    writer = WeightsWriter(target, "stage_000")
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)
        for source, share in zip(sources, shares, strict=True):
            total.add_(source.read(name).double(), alpha=share / whole)
        if not total.isfinite().all():
            raise WeightsError(f"{name} has values that are not finite in one of the checkpoints; leave that one out")
        writer.add(name, total.to(dtype))
    writer.flush()
    write_index(target)
