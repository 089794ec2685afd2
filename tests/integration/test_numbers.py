"""Numbers that are not finite, loss spikes and left-out data, in real runs: exactly the bad step is lost, on every rank, and nothing bad is published."""

import itertools
import json
from pathlib import Path

import pytest

from support.processes import SUPPORT, Ended, ranks, run_ranks
from support.training import records

pytestmark = pytest.mark.timeout(1200)
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "data.sequence_length=256",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "training.max_skipped_steps=10",
)


def train(corpus: Path, folder: Path, faults: dict, *overrides: str, processes: int = 2) -> list[Ended]:
    """Trains with faults to the end, whatever it is."""
    settings = (*SETTINGS, f"data.path={corpus}", f"output_dir={folder}", *overrides)
    variables = ranks(processes) if processes > 1 else [{}]
    command = [str(SUPPORT / "faulty_training.py"), json.dumps(faults), *settings]
    return run_ranks(command, variables, timeout=500)


def require_finished(ended: list[Ended]) -> None:
    """Fails with the output of a process that did not finish."""
    for one in ended:
        assert one.code == 0, one.stdout[-2000:] + one.stderr[-3000:]


def states(path: Path, rank: int) -> list[tuple[str, str]]:
    """Returns the digests after each step: of the weights, and of weights, moments and step counts."""
    lines = [json.loads(line) for line in path.with_name(f"{path.name}.{rank}").read_text().splitlines()]
    return [tuple(digests) for _, *digests in lines]


def published(folder: Path) -> list[int]:
    """Returns the steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def hashes(folder: Path, step: int) -> dict[str, str]:
    """Returns the sha256 of a checkpoint's files with weights, moments and health."""
    record = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").read_text())
    return {name: entry["sha256"] for name, entry in record["files"].items() if "metadata" not in name}


def test_step_that_is_not_finite_is_skipped_on_all_ranks_and_resumes_exactly(corpus, tmp_path):
    """NaN in one gradient of one rank, in the first step too, and an infinite loss whose gradients are finite, in torch's deterministic mode."""
    faults = {"nan": {"steps": [1, 3], "rank": 1}, "loss": {"steps": [4], "rank": 0}, "deterministic": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = ("training.steps=6", "checkpoint.interval=3")
    require_finished(train(corpus, whole, faults | {"states": str(tmp_path / "whole.states")}, *steps))
    for stop in (1, 3, 6):  # a save after skipped steps only, and one within a row of them
        require_finished(
            train(
                corpus,
                parts,
                faults | {"states": str(tmp_path / "parts.states")},
                *steps,
                f"training.stop_at_step={stop}",
            )
        )
    for rank in (0, 1):
        found = states(tmp_path / "whole.states", rank)
        assert [one != other for one, other in itertools.pairwise(found)] == [True, False, False, True, True]
        assert found == states(tmp_path / "parts.states", rank)
    weights = [[weights for weights, _ in states(tmp_path / "whole.states", rank)] for rank in (0, 1)]
    assert weights[0] == weights[1]
    logged = records(whole, "train")
    assert [record.get("skipped", False) for record in logged] == [True, False, True, True, False, False]
    assert (
        logged[3]["cross_entropy"] is None and logged[3]["grad_norm"] is None and logged[0]["cross_entropy"] is not None
    )
    assert records(parts, "train") == logged
    assert hashes(parts, 6) == hashes(whole, 6)
    health = json.loads((whole / "checkpoints/step_00000003/health.json").read_text())
    assert (health["skipped"], health["skipped_in_a_row"]) == (2, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_skips_exactly_that_step(corpus, tmp_path, stage):
    faults = {"nan": {"steps": [3], "rank": 1}, "loss": {"steps": [4], "rank": 0}, "states": str(tmp_path / "states")}
    steps = ("training.steps=5", "engine=deepspeed", f"deepspeed.zero_stage={stage}")
    ended = train(corpus, tmp_path / "run", faults, *steps)
    require_finished(ended)
    for rank in (0, 1):
        found = states(tmp_path / "states", rank)
        assert [one != other for one, other in itertools.pairwise(found)] == [True, False, False, True]
    logged = records(tmp_path / "run", "train")
    assert [record["step"] for record in logged if record.get("skipped")] == [3, 4]
    assert "step 3 skipped on all ranks" in ended[0].stderr


@pytest.mark.parametrize(("most", "last"), [(0, 2), (3, 4)])
def test_too_many_in_a_row_end_the_run_before_anything_is_published(corpus, tmp_path, most, last):
    faults = {"nan": {"steps": [2, 3, 4, 5]}}
    steps = ("training.steps=6", "checkpoint.interval=1", "checkpoint.keep=9", f"training.max_skipped_steps={most}")
    ended = train(corpus, tmp_path, faults, *steps, processes=1)
    assert ended[0].code == 6
    assert f"step {last} has cross entropy" in ended[0].stderr and "training has diverged" in ended[0].stderr
    assert f"training.max_skipped_steps={most}" in ended[0].stderr
    assert published(tmp_path) == list(range(1, last))
    assert hashes(tmp_path, last - 1).keys() == hashes(tmp_path, 1).keys()


def test_weights_that_are_not_finite_are_not_published(corpus, tmp_path):
    faults = {"weights": {"step": 3, "rank": 1}}
    steps = ("training.steps=6", "checkpoint.interval=1", "checkpoint.keep=1", "training.stop_at_step=3")
    ended = train(corpus, tmp_path, faults, *steps)
    assert [one.code for one in ended] == [6, 6]
    assert "step 3 is not published: " in ended[0].stderr
    assert "on rank 1 has values that are not finite. Earlier checkpoints are unchanged" in ended[0].stderr
    assert published(tmp_path) == [2], "the last good checkpoint stays, also with checkpoint.keep=1"


def test_rollback_ends_equal_to_a_run_without_these_data(corpus, tmp_path):
    """The spike is in one stream. The run goes back to step 34, although the interruption comes after the spike, and leaves out steps 35 and 36."""
    steps = ("training.steps=38", "checkpoint.interval=17", "attention.full_ratio=0.5", "training.rollback_window=16")
    faults = {"spike": {"steps": [36], "factor": 3.0, "stream": "sparse"}}
    rolled, by_hand = tmp_path / "rolled", tmp_path / "by_hand"
    ended = train(corpus, rolled, faults, *steps, "training.rollback_on_spike=true")
    require_finished(ended)
    require_finished(train(corpus, by_hand, {}, *steps, "training.skip_steps=[[35,36]]"))
    assert "spike at step 36: sparse cross entropy" in ended[0].stderr
    assert "rollback after the spike at step 36: back to step 34, without the data of steps 35 to 36" in ended[0].stdout
    (path,) = (rolled / "incidents").iterdir()
    incident = json.loads(path.read_text())
    assert (
        path.name == "step_00000036.json" and incident["decision"] == "rolled back" and incident["stream"] == "sparse"
    )
    assert (incident["skipped_steps"], incident["skipped_rows"]) == ([35, 36], [68, 71])
    assert incident["cross_entropy"] > 2 * incident["median"]
    one, other = records(rolled, "train"), records(by_hand, "train")
    assert [r.pop("skip_reason") for r in one if r.get("skipped")] == ["rollback"] * 2
    assert [r.pop("skip_reason") for r in other if r.get("skipped")] == ["training.skip_steps"] * 2
    assert one == other and not any("spike" in record for record in one)
    assert records(rolled, "evaluation") == records(by_hand, "evaluation")
    assert hashes(rolled, 38) == hashes(by_hand, 38)
    facts = [
        json.loads((f / "checkpoints/step_00000038/checkpoint.json").read_text())["facts"] for f in (rolled, by_hand)
    ]
    assert facts[0] == facts[1] and facts[0]["training.skip_steps"] == [[35, 36]]
    again = train(corpus, by_hand, {}, *steps, "training.steps=40", processes=1)
    assert again[0].code == 5
    assert "training.skip_steps: checkpoint [[35, 36]], run None" in again[0].stderr
