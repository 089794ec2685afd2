"""Compares the results of two runs of deepspeed_worker.py."""

import torch

from support.errors import relative

TOLERANCE = 1e-5
NUM_METRICS = 6  # cross entropy, norm, two layers' alignments and captured masses


def close(found: list, wanted: list) -> None:
    """Requires each value to 1e-5 of itself, and logits to 1e-5 of their norm."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        ours, theirs = (torch.tensor(row, dtype=torch.float64) for row in (one, other))
        if len(ours) > NUM_METRICS:
            assert relative(ours, theirs) < TOLERANCE
        else:
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0.0)
