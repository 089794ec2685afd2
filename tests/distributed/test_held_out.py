"""Held-out metrics do not depend on the layout, the engine or the micro-batch size: every held-out row counts once and padding never."""

import json
from pathlib import Path

import pytest

from support.processes import run_workers
from support.small_datasets import cut, write_dataset

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first test waits for all processes
WORKER = Path(__file__).with_name("held_out_worker.py")
LENGTH, VOCAB = 96, 96  # as in layout_worker.py
SIZES = {"long": 9 * LENGTH + 40, "short": 30}  # eleven rows, two of them padded
CASES = {
    "pp3_vpp2": {"parallel.pp": 3, "parallel.vpp": 2},
    "cp3": {"parallel.cp": 3},
    "dp3": {},
    "dp3.zero3": {"engine.name": "deepspeed", "deepspeed.zero_stage": 3},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list]:
    """Runs all cases once, in three processes. All ranks must return the same results."""
    folder = tmp_path_factory.mktemp("held_out")
    held = {name: [d % VOCAB for d in cut(size, seed=size)] for name, size in SIZES.items()}
    write_dataset(folder / "data", {}, held, vocab_size=VOCAB)
    (folder / "cases.json").write_text(json.dumps(CASES))
    run_workers(WORKER, 3, str(folder / "cases.json"), str(folder / "data"), str(folder))
    found = {}
    for name in CASES:
        parts = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(3)]
        assert all(part == parts[0] for part in parts), f"{name}: ranks report different metrics"
        found[name] = parts[0]
    documents = sum(map(len, held.values()))
    for written in found.values():
        for modes in written["held_out"]:
            assert [counts[-2:] for counts in modes] == [[sum(SIZES.values()) - documents, sum(SIZES.values())]] * 2
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_held_out_row_counts_once(results, name):
    wanted = results["pp3_vpp2"]["held_out"][0]
    assert wanted[0] != wanted[1], "the modes must differ, or the test proves nothing"
    for found in results[name]["held_out"]:
        for mode in (0, 1):
            assert found[mode] == pytest.approx(wanted[mode], rel=1e-6, abs=0)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_scored_and_continued_alike(results, name):
    """As tasks within a run do it, on data ranks that have no text of their own as well."""
    wanted = results["pp3_vpp2"]["scores"]
    assert wanted[0] != wanted[1]
    for mode in (0, 1):
        assert results[name]["scores"][mode] == pytest.approx(wanted[mode], rel=1e-5, abs=0)
