"""On real text the model learns more than word frequencies, and SSA training concentrates attention in the chosen blocks.

The two runs differ only in `attention=`. They run in parallel, on one core each.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.training import records, run, train

pytestmark = pytest.mark.timeout(1200)
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "training.steps=96",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=2",
    "optim.schedule=constant",  # so short a cosine ends before the attention has moved
    "evaluation.rows=16",
    "evaluation.interval=96",
    "checkpoint.interval=96",
    "evaluation.at_start=false",
    "logging.wandb.mode=off",
)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[str, Path]:
    """The same model trained with SSA and with full attention."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ("ssa", "full")}

    def start(method: str) -> None:
        train(
            *SETTINGS,
            f"attention={method}",
            "attention.impl=reference",
            f"data.path={corpus}",
            f"output_dir={folders[method]}",
            timeout=1100,
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(start, folders))
    return folders


def final(folder: Path) -> dict[str, dict]:
    """Returns a run's last evaluation by mode."""
    return {r["mode"]: r for r in records(folder, "evaluation")}


def test_cross_entropy_falls_well_below_unigram_entropy(runs, corpus):
    unigram = json.loads((corpus / "manifest.json").read_text())["unigram_entropy_nats"]["heldout"]
    for mode, metrics in final(runs["ssa"]).items():
        print(f"{mode}: cross entropy {metrics['cross_entropy']:.3f}, unigram entropy {unigram:.3f} nats")
        assert metrics["cross_entropy"] < unigram - 0.3


def test_ssa_captures_more_mass_than_full_attention(runs):
    for mode in ("full", "sparse"):
        ssa, full = (final(runs[method])[mode]["captured_mass"] for method in ("ssa", "full"))
        print(f"{mode}: captured mass {ssa:.3f} after ssa, {full:.3f} after full attention")
        assert ssa > full


def test_moved_run_folder_can_be_evaluated_and_sampled(runs, tmp_path):
    moved = tmp_path / "a run, moved"
    shutil.copytree(runs["ssa"], moved)
    done = run("ssa_pretrain.evaluate", str(moved), "evaluation.rows=4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (runs["ssa"] / "evaluation.json").exists()
    evaluation = json.loads((moved / "evaluation.json").read_text())
    assert evaluation["step"] == 96
    assert set(evaluation["modes"]) == {"full", "sparse"}
    for mode, metrics in evaluation["modes"].items():
        assert f"held-out, {mode:<6}: cross entropy {metrics['cross_entropy']:.4f}" in done.stdout
    samples = json.loads((moved / "samples.json").read_text())
    assert {s["mode"] for s in samples} == {"full", "sparse"}
    assert all(s["text"] for s in samples)


def test_evaluation_of_another_model_is_refused(runs, corpus):
    settings = (*SETTINGS, "model.num_layers=3", f"data.path={corpus}", f"output_dir={runs['ssa']}")
    done = run("ssa_pretrain.evaluate", *settings)
    assert done.returncode == 5
    assert "holds another model (" in done.stderr
    assert "); set the model as it was trained" in done.stderr
    assert "model.num_layers: checkpoint 2, run 3" in done.stderr
    assert "Traceback" not in done.stderr
