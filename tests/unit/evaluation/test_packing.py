"""ssa_pretrain/evaluation/packing.py: texts in microbatches of one shape, and microbatches over data ranks."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssa_pretrain.evaluation.packing import first_fit, over_data_ranks, pack_texts


@given(st.lists(st.integers(1, 64), max_size=40))
def test_first_fit_places_each_text_once_and_fills_no_microbatch_beyond_its_size(lengths):
    groups = first_fit(lengths, 64)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(0 < size <= 64 for size in sizes)
    assert sum(size <= 32 for size in sizes) <= 1, "two half-empty microbatches would have been one"


def test_labels_stand_at_their_texts():
    batch = pack_texts([[1, 2, 3], [4]], 16, 8, labels=[[2, 3, 5], [6]])
    assert batch.tokens.tolist() == [[1, 2, 3, 4] + [0] * 12]
    assert batch.labels.tolist() == [[2, 3, 5, 6] + [0] * 12]
    assert batch.positions.tolist() == [0, 1, 2, 0, *range(8), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 12, 16]
    assert batch.loss_mask.sum() == 0


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_every_rank_computes_equally_often_and_gets_every_result(monkeypatch, dp):
    groups, calls, found = [[3, 0], [1], [4, 2]], {}, {}

    def compute(rank: int, group: list[int]) -> list[int]:
        calls.setdefault(rank, []).append(group)
        return [10 * i for i in group]

    parts: list[dict] = []

    def gather(into: list, own: dict, group: object) -> None:
        parts.append(own)
        into[:] = parts if len(parts) == dp else [own] * dp

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for rank in range(dp):
        run = SimpleNamespace(
            plan=SimpleNamespace(dp=dp), placement=SimpleNamespace(dp_rank=rank, groups=SimpleNamespace(dp=None))
        )
        try:
            found = over_data_ranks(run, groups, lambda group, rank=rank: compute(rank, group))
        except KeyError:
            assert rank < dp - 1, "the last rank gathers all parts"
    assert found == [0, 10, 20, 30, 40]
    assert len({len(each) for each in calls.values()}) == 1
