"""Continuations of held-out prompts, sampled with full and with sparse attention."""

import numpy as np
import torch
from torch import Tensor

from ssa_pretrain.evaluation.generation import TOKENS_MULTIPLE, continue_texts
from ssa_pretrain.evaluation.scoring import tokenizer_of
from ssa_pretrain.run import Run

NUM_PROMPTS = 6
NEW_TOKENS = 48
TEMPERATURE = 0.8


def sample(run: Run, modes: tuple[str, ...]) -> list[dict[str, str]]:
    """Returns a continuation of each prompt in each mode, all drawn with the run's seed. Every rank computes the same samples.

    A prompt with its continuation is at most as long as a row. Of a longer prompt only the end is kept, and it gets no continuation.
    """
    tokenizer = tokenizer_of(run)
    prompts = [prompt[-run.config.data.sequence_length :] for prompt in held_out_prompts(run)]
    samples = []
    for mode in modes:
        for prompt, text in zip(prompts, continue_prompts(run, prompts, mode), strict=True):
            new = text[len(prompt) :]
            if run.manifest.tokenizer.eos_id in new:
                new = new[: new.index(run.manifest.tokenizer.eos_id)]
            samples.append({"prompt": tokenizer.decode(prompt), "mode": mode, "text": tokenizer.decode(new)})
    return samples


def continue_prompts(run: Run, prompts: list[list[int]], mode: str) -> list[list[int]]:
    """Returns the prompts with NEW_TOKENS sampled tokens each, or fewer if the row is full."""
    generator = torch.Generator().manual_seed(run.config.seed)

    def draw(logits: Tensor) -> list[int]:
        return torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator).flatten().tolist()

    multiple = TOKENS_MULTIPLE * run.plan.cp * run.plan.tp
    return continue_texts(run, prompts, mode=mode, num_new=NEW_TOKENS, choose=draw, multiple=multiple)


def held_out_prompts(run: Run) -> list[list[int]]:
    """Returns the beginnings of held-out rows, spread over the split.

    They are longer than the chosen blocks together, so that the modes attend to different keys.
    """
    covered, length = run.config.attention.top_k * run.config.attention.block_size, run.config.data.sequence_length
    size = max(1, min(2 * covered, length - min(NEW_TOKENS, length // 2)))
    prompts = []
    for i in range(run.held_out.num_rows):
        row = run.held_out.row(i)
        ends = np.append(np.flatnonzero(row.starts[1:]) + 1, len(row.tokens))
        if ends[0] > size:
            prompts.append(row.tokens[:size].tolist())
    stride = max(1, len(prompts) // NUM_PROMPTS)
    if not prompts:
        row = run.held_out.row(0)
        prompts = [row.tokens[: len(row.tokens) - row.padding][:size].tolist()]
    return prompts[::stride][:NUM_PROMPTS]
