"""Ranges of a flattened tensor as boxes of the tensor."""

import itertools
import math

import pytest
import torch

from ssa_pretrain.engine.megatron.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 6), (6, 1)])
def test_boxes_of_every_range_hold_its_elements_in_order(shape):
    numel = math.prod(shape)
    flat = torch.arange(numel)
    for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        found = list(boxes(shape, start, stop))
        parts = [flat.view(shape)[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in found]
        assert torch.equal(torch.cat([flat[:0], *parts]), flat[start:stop])
        assert len(found) <= 2 * len(shape) - 1


def test_whole_tensor_is_one_box():
    assert list(boxes((3, 5), 0, 15)) == [((0, 0), (3, 5))]
