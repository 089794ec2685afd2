"""The scaling benchmark on two CPU processes: layouts train the same rows to the same losses, and a saved layout resumes on another."""

import json

import pytest

from benchmarks.scaling.cases import SSA, TP2, VPP2, Case
from support.processes import ROOT, run_workers

WORKER = ROOT / "tests" / "benchmarks" / "scaling" / "worker.py"
CASES = [
    Case(layout="dp2", length="8k", gpus=2, variants=(SSA, "full"), exposed=(SSA,)),
    Case(layout="tp2", length="8k", gpus=2, settings=TP2),
    Case(layout="pp2 vpp2", length="8k", gpus=2, settings=VPP2),
    Case(layout="dp2", length="8k", gpus=2, kind="save", then=TP2),
    Case(layout="tp2, 4 rows", length="8k", gpus=2, settings=TP2, rows=4),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    """Returns the results by case."""
    folder = tmp_path_factory.mktemp("scaling")
    job = {"size": "toy", "host_gpus": 2, "scratch": str(folder), "cases": [case.to_json() for case in CASES]}
    (folder / "job.json").write_text(json.dumps(job))
    run_workers(WORKER, 2, str(folder / "job.json"), str(folder / "results.jsonl"))
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert not (folder / "checkpoint").exists()
    return {line["name"]: line["results"] for line in lines}


def test_layouts_train_the_same_rows_to_the_same_losses(results):
    (wanted, full), *others = (results[case.name] for case in CASES[:3])
    for (found,) in others:
        for ours, theirs in zip(found["losses"], wanted["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert wanted["losses"][0] != wanted["losses"][1]
    assert full["variant"] == "full" and "losses" not in full and full["tokens_per_second"] > 0
    assert 0.0 <= wanted["exposed"] < 1.0 and wanted["traced_ms"] > 0


def test_rows_of_its_own_have_no_losses_to_compare(results):
    (found,) = results["tp2, 4 rows, 8k"]
    assert "losses" not in found and found["microbatches"] == 2 and found["tokens_per_second"] > 0


def test_saved_layout_resumes_on_another(results):
    (found,) = results["dp2, 8k, saved"]
    assert found["gib"] > 0 and found["save_seconds"] > 0
    for ours, theirs in zip(found["resumed_losses"], found["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found["losses_before"][0] != found["losses"][0]
