"""Each label's log-probability from the logits of the padded vocabulary, in slices so that little of them is in fp32 at once."""

import torch
from torch import Tensor

SCORED_TOKENS = 1024  # tokens whose logits are in fp32 at once


def label_scores(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Returns each label's log-probability, and 1 if it is the likeliest of the vocabulary, else 0: fp32 [T, 2].

    Args:
        logits: [T, padded V]; as in training, the padding takes part in the softmax.
        labels: int64 [T].
        vocab_size: tokens of the tokenizer.
    """
    found = []
    for wide, label in zip(logits.split(SCORED_TOKENS), labels.split(SCORED_TOKENS), strict=True):
        wide = wide.float()
        own = wide.gather(1, label[:, None])[:, 0] - wide.logsumexp(-1)
        found.append(torch.stack([own, (wide[:, :vocab_size].argmax(-1) == label).float()], dim=1))
    return torch.cat(found)
