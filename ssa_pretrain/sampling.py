"""Continuations of held-out prompts, sampled with full and with sparse attention."""

import sys

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from ssa_pretrain.data.batches import Batch
from ssa_pretrain.run import Run

NUM_PROMPTS = 6
NEW_TOKENS = 48
TEMPERATURE = 0.8
TOKENS_MULTIPLE = 16  # of a packed sequence per rank: FP8 products need 8, context parallelism two chunks


def sample(run: Run, modes: tuple[str, ...]) -> list[dict[str, str]]:
    """Returns a continuation of each prompt in each mode, all drawn with the run's seed. Every rank computes the same samples.

    A prompt with its continuation is at most as long as a row. Of a longer prompt only the end is kept, and it gets no continuation.
    """
    tokenizer = Tokenizer.from_file(str(run.manifest.root / run.manifest.tokenizer.file))
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
    length = run.config.data.sequence_length  # positions end with the row
    generator = torch.Generator().manual_seed(run.config.seed)
    texts = [list(prompt) for prompt in prompts]
    count = min(NEW_TOKENS, length - min(len(text) for text in texts))
    shown = run.placement.is_rank_0 and sys.stderr.isatty()
    for _ in tqdm(range(count), desc=f"sampling, {mode}", disable=not shown, leave=False):
        packed = packed_prompts(texts, TOKENS_MULTIPLE * run.plan.cp * run.plan.tp, length)
        logits = run.engine.last_logits(packed, mode=mode).cpu()
        logits = logits[: len(texts), : run.plan.vocab_size]
        chosen = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)
        for text, token in zip(texts, chosen.flatten().tolist(), strict=True):
            if len(text) < length:
                text.append(token)
    return texts


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


def packed_prompts(texts: list[list[int]], multiple: int, length: int) -> Batch:
    """Returns the texts as documents of one microbatch without labels. Documents of at most `length` tokens pad it to a multiple of `multiple`."""
    rest = -sum(len(text) for text in texts) % multiple
    texts = [*texts, *([0] * min(length, rest - begin) for begin in range(0, rest, length))]
    tokens = torch.tensor([t for text in texts for t in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    ends = torch.tensor([0] + [len(text) for text in texts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    empty = torch.zeros_like(tokens).unsqueeze(0)
    return Batch(0, tokens.unsqueeze(0), empty, empty.float(), positions, ends)
