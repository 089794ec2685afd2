"""An imported model of the release gives the logits of the released computation: full, and sparse under its own rule of selection.

The weights are random; the other side is `support/released_forward.py`. Documents of more than two chunks of block_size blocks are where the official
search loses blocks. Shorter ones that end with a block are where only its softmax differs, which counts the own block then.
"""

from dataclasses import replace

import pytest
import torch

from ssa_pretrain.config import Method, Score
from ssa_pretrain.huggingface.importing import read_record
from support import released_forward
from support.foreign_llama import SIZES, random_tensors, released_record, write_folder
from support.imported import import_to, training_logits

TOLERANCE = 1e-5


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize(("block_counts", "lengths"), [(16, (1, 31, 272, 527, 560)), (4, range(64, 257, 16))])
def test_logits_are_those_of_the_release(tmp_path, placement, mode, block_counts, lengths):
    tensors = random_tensors(gate_rows=3, tied=True)
    folder = write_folder(tmp_path / "release", released_record(block_counts=block_counts), tensors)
    config = import_to(folder, tmp_path / "run")
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(SIZES["vocab_size"], (length,), generator=generator) for length in lengths]
    record = read_record(folder)
    wanted = torch.stack([released_forward.logits(tensors, record, d, mode)[-1] for d in documents])

    def errors(score: Score) -> torch.Tensor:
        changed = replace(config, attention=replace(config.attention, score=score))
        found = training_logits(changed, tmp_path / "run", placement, mode, documents)
        return (found - wanted).norm(dim=1) / wanted.norm(dim=1)

    assert (errors(config.attention.score) < TOLERANCE).all()
    if mode == "sparse":
        differ = errors(Score.softmax_sum) > TOLERANCE
        assert differ.any(), "the rules differ here"
        assert not differ[0], "all blocks are chosen"


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_logits_of_nsa_are_those_of_the_release(tmp_path, placement, mode):
    """In full mode the selected branch attends to every earlier key; the other two are the same."""
    tensors = random_tensors(gate_rows=3, tied=True)
    folder = write_folder(tmp_path / "release", released_record(block_counts=4, window_size=24), tensors)
    config = import_to(folder, tmp_path / "run", method=Method.nsa)
    assert (config.attention.window, config.attention.alignment_weight, config.attention.gate) == (24, 0.0, True)
    generator = torch.Generator().manual_seed(2)
    documents = [
        torch.randint(SIZES["vocab_size"], (n,), generator=generator) for n in (1, 15, 16, 17, 64, 80, 250, 256)
    ]
    wanted = torch.stack([released_forward.logits(tensors, read_record(folder), d, mode)[-1] for d in documents])
    found = training_logits(config, tmp_path / "run", placement, mode, documents)
    assert (((found - wanted).norm(dim=1) / wanted.norm(dim=1)) < TOLERANCE).all()
