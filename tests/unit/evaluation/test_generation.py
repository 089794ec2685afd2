"""Generation from a cache of keys, values and block means: the tokens are those of forwards over the whole text, in both modes."""

import pytest
import torch

from ssa_pretrain.config import Config, IndexerConfig, Method, Score
from ssa_pretrain.evaluation import generation
from ssa_pretrain.evaluation.generation import continue_texts, generate_greedily
from ssa_pretrain.model import spec
from ssa_pretrain.model.attention import SSAAttention
from ssa_pretrain.model.indexer import IndexerAttention
from ssa_pretrain.model.nsa import NSAAttention
from ssa_pretrain.model.text_cache import TextCache
from support.generation_run import LENGTH, LENGTHS, likeliest, prompts, require_likeliest, run_of, with_cache
from support.hf_models import VOCAB

NEW = 500


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_500_tokens_are_those_of_whole_forwards(placement, monkeypatch, mode):
    """All of them follow from one forward over the whole texts; the first 30 also from forwards over the texts so far, one by one."""
    run, texts = run_of(placement), prompts()
    found = with_cache(run, texts, mode, NEW)
    assert [len(text) for text in found] == [n + NEW for n in LENGTHS]
    assert all(len(set(text[-NEW:])) > VOCAB / 3 for text in found), "a text that repeats itself proves little"
    assert all(text[: len(prompt)] == prompt for text, prompt in zip(found, texts, strict=True))
    require_likeliest(run, found, LENGTHS, mode)
    monkeypatch.setattr(SSAAttention, "continues_from_cache", lambda: False)
    again = continue_texts(run, texts, mode=mode, num_new=30, choose=likeliest, multiple=16)
    assert again == [text[: n + 30] for text, n in zip(found, LENGTHS, strict=True)]


@pytest.mark.parametrize("score", [Score.per_head, Score.official_compat])
def test_other_scores(placement, monkeypatch, score):
    run, texts = run_of(placement, score=score, top_k=4), prompts([130, 65])
    found = with_cache(run, texts, "sparse", 40)
    monkeypatch.setattr(SSAAttention, "continues_from_cache", lambda: False)
    assert continue_texts(run, texts, mode="sparse", num_new=40, choose=likeliest, multiple=16) == found


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_nsa_continues_from_its_cache(placement, monkeypatch, mode):
    """Texts of several pages, across the ends of blocks; one reaches the end of its row before the others."""
    run = run_of(placement, method=Method.nsa, score=Score.compressed, window=20)
    texts = prompts([1, 15, 16, 130, LENGTH - 10])
    assert NSAAttention.continues_from_cache()
    found = with_cache(run, texts, mode, 40)
    assert all(len(set(text[-10:])) > 3 for text in found), "a text that repeats itself proves little"
    monkeypatch.setattr(NSAAttention, "continues_from_cache", lambda: False)
    assert continue_texts(run, texts, mode=mode, num_new=40, choose=likeliest, multiple=16) == found


@pytest.mark.parametrize(
    ("method", "mode"), [(Method.indexer, "full"), (Method.indexer, "sparse"), (Method.ssa, "sparse")]
)
def test_a_trained_scorer_continues_from_its_cache(placement, monkeypatch, method, mode):
    """Texts of several pages, across the ends of blocks."""
    run = run_of(
        placement, method=method, score=Score.indexer, indexer=IndexerConfig(heads=2), gate=method is Method.ssa
    )
    texts = prompts([1, 15, 16, 130])
    found = with_cache(run, texts, mode, 40)
    assert all(len(set(text[-10:])) > 3 for text in found), "a text that repeats itself proves little"
    monkeypatch.setattr(IndexerAttention, "continues_from_cache", lambda: False)
    assert continue_texts(run, texts, mode=mode, num_new=40, choose=likeliest, multiple=16) == found


def test_full_rows_end_and_others_go_on(placement, monkeypatch):
    """Texts reach the end of the row at different steps; the same draws are made for the others."""
    run = run_of(placement)
    texts, found = prompts([LENGTH, LENGTH - 3, 600]), []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(SSAAttention, "continues_from_cache", lambda: False)
        generator = torch.Generator().manual_seed(3)

        def draw(logits: torch.Tensor, generator=generator) -> list[int]:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten().tolist()

        found.append(continue_texts(run, texts, mode="sparse", num_new=12, choose=draw, multiple=16))
    assert [len(text) for text in found[0]] == [LENGTH, LENGTH, 612]
    assert found[0] == found[1]


def test_greedy_texts_end_when_all_are_done(placement):
    run = run_of(placement)
    begun = prompts([50, 90, 17, 300])
    whole = generate_greedily(run, begun, mode="sparse", num_new=20)
    run.manifest.tokenizer.eos_id = whole[0][4]
    found = generate_greedily(run, begun, mode="sparse", num_new=20)
    eos = whole[0][4]
    assert found == [new[: new.index(eos)] if eos in new else new for new in whole]
    assert found != whole


class Window(SSAAttention):
    """A method that chooses by itself."""

    def select(self, q, k, layout):
        """Returns each query's own block and the one before it."""
        own = layout.query_position // layout.block_size
        blocks = torch.stack([own - 1, own], dim=1)
        blocks = torch.where((blocks < 0).any(1, keepdim=True), blocks.flip(1), blocks).clamp(min=-1)
        return blocks[:, None].expand(-1, k.shape[1], -1).int()


def test_a_method_with_its_own_choice_is_not_continued_from_a_cache(placement, monkeypatch):
    class Both(Window):
        def _newest_tokens(self, *arguments):
            return super()._newest_tokens(*arguments)

    assert SSAAttention.continues_from_cache() and Both.continues_from_cache() and not Window.continues_from_cache()
    monkeypatch.setitem(spec.ATTENTION, Method.ssa, Window)
    run, texts = run_of(placement, top_k=2), prompts([70])
    assert generation._empty_cache(run, texts, 9) is None
    (text,) = continue_texts(run, texts, mode="sparse", num_new=9, choose=likeliest, multiple=16)
    require_likeliest(run, [text], [70], "sparse")


def test_a_cache_has_room_for_what_is_asked_and_no_more():
    cache = TextCache([5, 16, 1], [17, 16, 33], block_size=16, device=torch.device("cpu"))
    assert cache.num_pages == 2 + 1 + 3
    assert cache.page_table.tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    cache.advance([True, False, True])
    assert cache.seq_lens.tolist() == cache.lengths == [6, 16, 2] and cache.num_new.tolist() == [1, 0, 1]
