"""Continues texts token by token: the only place that decides how a continuation is computed.

The first forward is over the texts, packed as documents, and keeps their keys, values and block means (model/text_cache.py). Each later one is over
the newest token of each text. The tokens are those of a forward over everything for each new token, in every layout: tensor, pipeline and context
parallelism and both engines. Such forwards remain for an attention method whose layer cannot continue from a cache (`continues_from_cache`).

A step's tokens are filled up to a multiple that FP8 products and sequence parallelism can divide; where Transformer Engine's user buffers are in use,
to a whole microbatch, because they have its shape.
"""

import sys
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from ssa_pretrain.evaluation.packing import (
    first_fit,
    microbatch_tokens,
    newest_tokens,
    on_all_data_ranks,
    over_data_ranks,
    pack_texts,
)
from ssa_pretrain.model.spec import attention_class
from ssa_pretrain.model.text_cache import TextCache
from ssa_pretrain.run import Run

Choose = Callable[[Tensor], list[int]]  # logits [texts, V], fp32 on the host -> a token per text
TOKENS_MULTIPLE = 16  # of a forward's tokens per rank: FP8 products need 8, context parallelism two chunks


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
    kept = _empty_cache(run, texts, count)
    shown = run.placement.is_rank_0 and sys.stderr.isatty()
    for step in tqdm(range(count), desc=f"sampling, {mode}", disable=not shown, leave=False):
        if step == 0 or kept is None:
            logits = run.engine.last_logits(pack_texts(texts, multiple, length), mode=mode, texts=kept)
        else:
            logits = run.engine.next_logits(newest_tokens(texts, _step_multiple(run)), mode=mode, texts=kept)
        chosen = choose(logits.cpu()[: len(texts), : run.plan.vocab_size])
        grows = [len(text) < length for text in texts]
        for text, token, grow in zip(texts, chosen, grows, strict=True):
            text.extend([token] * grow)
        if kept is not None:
            kept.advance(grows)
        if is_done and on_all_data_ranks(run, all(map(is_done, texts, begun))):
            break
    return texts


def _empty_cache(run: Run, texts: Sequence[list[int]], num_new: int) -> TextCache | None:
    """Returns a cache with room for `num_new` tokens more of each text, None if the attention method cannot continue from one."""
    attention, length = run.config.attention, run.config.data.sequence_length
    if num_new <= 1 or not attention_class(attention).continues_from_cache():
        return None
    lengths = [len(text) for text in texts]
    room = [min(n + num_new, length) for n in lengths]
    return TextCache(lengths, room, block_size=attention.block_size, device=run.placement.device)


def _step_multiple(run: Run) -> int:
    """Returns what the number of a step's tokens is a multiple of."""
    return microbatch_tokens(run) if run.config.engine.overlap_tp else TOKENS_MULTIPLE * run.plan.tp
