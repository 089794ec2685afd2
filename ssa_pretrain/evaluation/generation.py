"""Continues texts token by token: the only place that decides how a continuation is computed.

Each new token costs a forward over all texts, because the training model has no key-value cache. A decoder with a cache replaces `continue_texts`,
which promises no more than its arguments: texts, a mode, a number of tokens, and a function from logits to tokens.
"""

import sys
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from ssa_pretrain.evaluation.packing import (
    first_fit,
    microbatch_tokens,
    on_all_data_ranks,
    over_data_ranks,
    pack_texts,
)
from ssa_pretrain.run import Run

Choose = Callable[[Tensor], list[int]]  # logits [texts, V], fp32 on the host -> a token per text


def generate_greedily(
    run: Run, prompts: Sequence[list[int]], *, mode: str, num_new: int, stop: Callable[[list[int]], bool] | None = None
) -> list[list[int]]:
    """Returns the likeliest continuation of each prompt, up to EOS, `num_new` tokens or the end of a row; every rank calls it.

    Args:
        run: its data ranks share the prompts.
        prompts: token ids; of one with more than `sequence_length - num_new` tokens, only the end is read.
        mode: the main stream.
        num_new: new tokens per prompt at most.
        stop: whether new tokens need no further one.
    """
    length, eos = run.config.data.sequence_length, run.manifest.tokenizer.eos_id
    texts = [prompt[-max(1, length - num_new) :] for prompt in prompts]

    def compute(group: list[int]) -> list[list[int]]:
        begun = [texts[i] for i in group]

        def is_done(text: list[int], prompt: list[int]) -> bool:
            new = text[len(prompt) :]
            return eos in new or (stop is not None and stop(new))

        continued = continue_texts(
            run,
            begun,
            mode=mode,
            num_new=num_new,
            choose=lambda logits: logits.argmax(-1).tolist(),
            multiple=microbatch_tokens(run),
            is_done=is_done,
        )
        found = [text[len(prompt) :] for text, prompt in zip(continued, begun, strict=True)]
        return [new[: new.index(eos)] if eos in new else new for new in found]

    sizes = [min(len(text) + num_new, length) for text in texts]
    return over_data_ranks(run, first_fit(sizes, microbatch_tokens(run)), compute)


def continue_texts(
    run: Run,
    texts: Sequence[list[int]],
    *,
    mode: str,
    num_new: int,
    choose: Choose,
    multiple: int,
    is_done: Callable[[list[int], list[int]], bool] | None = None,
) -> list[list[int]]:
    """Returns the texts with `num_new` tokens each, or fewer if the row is full; the ranks of one model call it together.

    Args:
        run: the model.
        texts: token ids, at most `sequence_length` per text.
        mode: the main stream.
        num_new: new tokens.
        choose: picks each text's next token.
        multiple: tokens of the packed texts are filled up to a multiple of this.
        is_done: (text, its beginning) -> whether it needs no further token. Generation ends if that holds for all texts of all data ranks, which
            then call this together with the same `num_new`.
    """
    length, begun = run.config.data.sequence_length, texts
    texts = [list(text) for text in texts]
    count = min(num_new, length - min(len(text) for text in texts))
    shown = run.placement.is_rank_0 and sys.stderr.isatty()
    for _ in tqdm(range(count), desc=f"sampling, {mode}", disable=not shown, leave=False):
        logits = run.engine.last_logits(pack_texts(texts, multiple, length), mode=mode).cpu()
        chosen = choose(logits[: len(texts), : run.plan.vocab_size])
        for text, token in zip(texts, chosen, strict=True):
            if len(text) < length:
                text.append(token)
        if is_done and on_all_data_ranks(run, all(map(is_done, texts, begun))):
            break
    return texts
