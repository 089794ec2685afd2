"""An attention method, a tracker and a source of data, each added in under 60 lines and used by the program it extends."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.monitor.names import metric_of
from ssa_pretrain.monitor.tracking_rows import flatten
from support.processes import environment, run_workers
from support.small_datasets import cut, write_dataset
from support.training import records

EXERCISES = Path(__file__).with_name("exercises")
LENGTH, BLOCK = 128, 16
TRAINING = (
    "experiment=quickstart",
    "model.num_layers=2",
    f"attention.block_size={BLOCK}",
    f"data.sequence_length={LENGTH}",
    "training.steps=2",
    f"training.global_batch_tokens={2 * LENGTH}",
    "training.micro_batch_size=1",
    "evaluation.rows=2",
    "evaluation.interval=2",
)


@pytest.mark.parametrize("name", ["attention_method", "tracker", "data_source"])
def test_exercise_is_short(name: str) -> None:
    assert len((EXERCISES / f"{name}.py").read_text().splitlines()) < 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 40 rows, of documents with up to 80 tokens."""
    folder = tmp_path_factory.mktemp("exercises") / "data"
    write_dataset(folder, {"text": cut(40 * LENGTH)}, {"text": cut(4 * LENGTH, seed=1)})
    return folder


def train(exercise: str, data: Path, out: Path, *overrides: str) -> list[dict]:
    """Trains with an exercise, and returns the records of the run."""
    script = EXERCISES / f"{exercise}.py"
    run_workers(script, 1, *TRAINING, f"data.path={data}", f"output_dir={out}", *overrides)
    return records(out, "train") + records(out, "evaluation")


def test_attention_method(data: Path, tmp_path: Path) -> None:
    """A window as wide as a row equals full attention. A narrow one differs from it and from SSA's own selection."""
    wide = train("attention_method", data, tmp_path / "wide", f"attention.top_k={LENGTH // BLOCK}")
    narrow = train("attention_method", data, tmp_path / "narrow", "attention.top_k=1", "attention.full_ratio=0")
    assert all(record["captured_mass"] == pytest.approx(1.0, abs=1e-6) for record in wide)
    for record in wide:
        assert record.get("alignment_loss", 0.0) == pytest.approx(0.0, abs=1e-12)
    full, sparse = wide[-2:]
    assert full["cross_entropy"] == pytest.approx(sparse["cross_entropy"], rel=1e-6)
    assert all(math.isfinite(record["cross_entropy"]) and record["captured_mass"] < 0.99 for record in narrow)


def test_tracker(data: Path, tmp_path: Path) -> None:
    """The file holds exactly the metrics of the run."""
    train("tracker", data, tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        found = sorted(tuple(row) for row in csv.reader(file))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "checkpoint"]  # which trackers do not get
    wanted = [(str(line["step"]), name, str(value)) for line in lines for name, value in flatten(line).items()]
    assert found == sorted(wanted) and len(lines) == 6
    for line in lines:
        for key in line:
            metric_of(key)  # raises for one that the list of metrics lacks


def test_data_source(tmp_path: Path) -> None:
    """The dataset holds a document per module."""
    modules = ("argparse", "csv", "json", "logging", "typing")
    small = ("tokenizer=bpe4k", "tokenizer.vocab_size=512", "split.heldout_fraction=0.3", "workers=1")
    settings = ("source=docstrings", f"source.modules=[{','.join(modules)}]", f"out={tmp_path / 'data'}")
    done = subprocess.run(
        [sys.executable, str(EXERCISES / "data_source.py"), *settings, *small],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    splits = load_manifest(tmp_path / "data").splits
    assert sum(shard.documents for shards in splits.values() for shard in shards) == len(modules)
