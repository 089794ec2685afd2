"""What generation needs of a run, around a small model whose text does not repeat itself at once, and the likeliest continuations of random texts."""

from types import SimpleNamespace
from typing import Any

import torch

from ssa_pretrain.engine import build_engine
from ssa_pretrain.evaluation.generation import continue_texts
from ssa_pretrain.evaluation.packing import pack_texts
from ssa_pretrain.parallel.state import Placement
from support.hf_models import VOCAB, draw_documents, small_config

LENGTH = 720
LENGTHS = [1, 15, 16, 33, 200]


def run_of(placement: Placement, **attention: object) -> Any:
    """Returns what generation needs of a run: a small model whose text does not repeat itself at once."""
    config = small_config(**attention)
    config.model.init_std, config.model.tie_embeddings = 0.3, False
    config.data.sequence_length = LENGTH
    config.training.micro_batch_size = 4
    plan = SimpleNamespace(vocab_size=VOCAB, dp=1, tp=1, cp=1)
    manifest = SimpleNamespace(tokenizer=SimpleNamespace(eos_id=VOCAB + 1))
    engine = build_engine(config, placement, VOCAB)
    return SimpleNamespace(config=config, plan=plan, manifest=manifest, placement=placement, engine=engine)


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    """Returns random texts."""
    return [document.tolist() for document in draw_documents(lengths)]


def likeliest(logits: torch.Tensor) -> list[int]:
    """Returns each text's likeliest token."""
    return logits.argmax(-1).tolist()


def with_cache(run: Any, texts: list[list[int]], mode: str, num_new: int) -> list[list[int]]:
    """Returns the likeliest continuations; every forward but the first must be of newest tokens."""
    calls = {"last_logits": 0, "next_logits": 0}

    def counted(name):
        method = getattr(type(run.engine), name)

        def call(*args, **kwargs):
            calls[name] += 1
            return method(run.engine, *args, **kwargs)

        return call

    for name in calls:
        setattr(run.engine, name, counted(name))
    try:
        found = continue_texts(run, texts, mode=mode, num_new=num_new, choose=likeliest, multiple=16)
    finally:
        for name in calls:
            delattr(run.engine, name)
    assert calls == {"last_logits": 1, "next_logits": num_new - 1}
    return found


def require_likeliest(run: Any, texts: list[list[int]], lengths: list[int], mode: str) -> None:
    """Fails unless each token after the first `lengths` ones is what a forward over the whole text finds likeliest after those before it."""
    for text, begun in zip(texts, lengths, strict=True):
        scores = run.engine.score_labels(pack_texts([text], 16, LENGTH, [[*text[1:], 0]]), mode=mode)
        assert (scores[begun - 1 : len(text) - 1, 1] == 1).all()
