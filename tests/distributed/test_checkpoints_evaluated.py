"""A checkpoint's evaluation does not depend on the layout or the engine that wrote it, nor on the layout that evaluates it.

Held-out metrics with their positions, attention by head, scores of requests, and greedy continuations: what four processes find equals what one finds.
"""

import json

import pytest

from support.processes import run_workers
from support.small_datasets import cut, write_dataset

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first test waits for all processes
VOCAB = 96  # as in layout_worker.py
CASES = {
    "tp2_pp2": {"parallel.tp": 2, "parallel.pp": 2},
    "cp2_tp2_sp": {"parallel.cp": 2, "parallel.tp": 2, "parallel.sequence_parallel": True},
    "cp2_pp2_indexer": {"parallel.cp": 2, "parallel.pp": 2, "attention.score": "indexer", "attention.indexer.heads": 2},
    "zero3_tp2": {"engine.name": "deepspeed", "deepspeed.zero_stage": 3, "parallel.tp": 2},
}


def attention_of(case: dict) -> dict:
    """Returns a case's settings of the model, without those of the layout and the engine."""
    return {key: value for key, value in case.items() if key.startswith("attention.")}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """Returns by case what its own four processes and one process found. All ranks must agree."""
    folder = tmp_path_factory.mktemp("evaluated")
    held = {"held": [d % VOCAB for d in cut(700, seed=3)]}
    write_dataset(folder / "data", {}, held, vocab_size=VOCAB)
    worker = __file__.replace("test_checkpoints_evaluated", "evaluation_worker")
    found = {name: [] for name in CASES}
    for act, world_size in (("save", 4), ("evaluate", 1)):
        cases = CASES if act == "save" else {name: attention_of(case) for name, case in CASES.items()}
        (folder / "cases.json").write_text(json.dumps(cases))
        run_workers(worker, world_size, str(folder / "cases.json"), str(folder / "data"), str(folder), act)
        for name in CASES:
            parts = [json.loads((folder / f"{name}.{act}.{rank}.json").read_text()) for rank in range(world_size)]
            assert all(part == parts[0] for part in parts), f"{name}: ranks report different results"
            found[name].append(parts[0])
    return {name: (own, one) for name, (own, one) in found.items()}


def numbers(value) -> list[float]:
    """Returns all numbers of a nested value, in order."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    return [x for item in value for x in numbers(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("what", ["held_out", "heads", "scores", "greedy", "generated"])
def test_layout_finds_what_one_process_finds(results, name, what):
    own, one = results[name]
    assert numbers(one["full"][what]) != numbers(one["sparse"][what]) or what == "greedy", "the modes must differ"
    for mode in ("full", "sparse"):
        assert numbers(own[mode][what]) == pytest.approx(numbers(one[mode][what]), rel=2e-5, abs=1e-7)


def test_positions_hold_every_label(results):
    for own, _ in results.values():
        for found in (own[mode]["held_out"] for mode in ("full", "sparse")):
            assert sum(found["labels_by_position"]) == found["num_labels"]
            total = sum(found["cross_entropy_by_position"]) / found["num_labels"]
            assert total == pytest.approx(found["cross_entropy"], rel=1e-6)


def test_engines_and_layouts_train_to_the_same_evaluation(results):
    """The checkpoints of one model are of the same step, so they also agree among each other."""
    same = [one for name, (_, one) in results.items() if not attention_of(CASES[name])]
    first, *others = [numbers(one["full"]["held_out"]) for one in same]
    assert len(others) == 2
    for other in others:
        assert other == pytest.approx(first, rel=1e-4, abs=1e-6)
