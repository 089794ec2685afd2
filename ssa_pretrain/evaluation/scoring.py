"""Log-likelihoods of continuations, the basis of multiple choice and of lm_eval's requests.

A request is (context, continuation) in tokens; its score is the sum of the log-probabilities of the continuation's tokens after the context. Too long
a text loses its beginning, as in lm_eval's `hf` model: the model reads the last `sequence_length` tokens before the last one. How a text becomes a
request is lm_eval's definition as well (`TemplateLM._encode_pair`, lm_eval 0.4.13): context and continuation are encoded together and cut where the
context's own tokens end, after spaces at the context's end have moved to the continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from ssa_pretrain.evaluation.packing import first_fit, microbatch_tokens, over_data_ranks, pack_texts
from ssa_pretrain.run import Run

Request = tuple[list[int], list[int]]  # context, at least one token; continuation


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a continuation: the sum of its tokens' log-probabilities in nats, and whether greedy decoding would have given it."""

    log_likelihood: float
    is_greedy: bool


def score_requests(run: Run, requests: Sequence[Request], mode: str) -> list[Score]:
    """Returns the score of each request; every rank calls it."""
    length, capacity = run.config.data.sequence_length, microbatch_tokens(run)
    whole = [(context + continuation)[-(length + 1) :] for context, continuation in requests]
    scored = [min(len(continuation), length) for _, continuation in requests]

    def compute(group: list[int]) -> list[Score]:
        texts, labels = [whole[i][:-1] for i in group], [whole[i][1:] for i in group]
        scores = run.engine.score_labels(pack_texts(texts, capacity, length, labels), mode=mode).double().cpu()
        found, end = [], 0
        for i in group:
            end += len(whole[i]) - 1
            own = scores[end - scored[i] : end]
            found.append(Score(float(own[:, 0].sum()), bool(torch.all(own[:, 1] == 1))))
        return found

    return over_data_ranks(run, first_fit([len(tokens) - 1 for tokens in whole], capacity), compute)


def encode_request(tokenizer: Tokenizer, context: str, continuation: str, prefix: int) -> Request:
    """Returns a request in tokens.

    Args:
        tokenizer: the model's.
        context, continuation: the text.
        prefix: stands for an empty context.
    """
    if not context:
        tokens = encode(tokenizer, continuation)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
    stripped = context.rstrip()
    begin = encode(tokenizer, stripped)
    return begin, encode(tokenizer, context + continuation)[len(begin) :]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns a text's tokens without any that mark its begin or end."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def prefix_token(run: Run) -> int:
    """Returns the token that stands for an empty context: BOS if the tokenizer has one, else EOS. Neither began a document in training."""
    tokenizer = run.manifest.tokenizer
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def tokenizer_of(run: Run) -> Tokenizer:
    """Returns the tokenizer of the run's dataset."""
    return Tokenizer.from_file(str(run.manifest.root / run.manifest.tokenizer.file))
