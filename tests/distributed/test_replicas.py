"""One flipped bit of one weight on one rank is found and named within the interval, on every layout with copies; equal copies raise no alarm."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.processes import ON_GPUS, ranks, run_ranks, run_workers
from support.small_datasets import cut, write_dataset

WORKER = Path(__file__).parent / "replica_worker.py"
RUN = Path(__file__).parent / "flipping_run.py"
EVERY, THIRD = {"training.replica_check_interval": 1}, {"training.replica_check_interval": 3}
ALONE = {"engine.distributed_optimizer": False}  # each rank updates its own copy, so a wrong weight stays
OVERLAP = {"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True}
BF16 = {"precision.name": "bf16"}
ZERO = {"engine.name": "deepspeed", "training.global_batch_tokens": 8 * 96}
CASES = {
    2: {
        "alone": THIRD | ALONE,
        "distributed_optimizer": EVERY | OVERLAP,
    },
    4: {
        "alone": THIRD | ALONE,
        "tp2": EVERY | BF16 | {"parallel.tp": 2, "parallel.sequence_parallel": True},
        "pp2": THIRD | ALONE | {"parallel.pp": 2},
        "cp2": EVERY | BF16 | OVERLAP | {"parallel.cp": 2},
    },
}
if find_spec("deepspeed"):
    CASES[2] |= {f"zero{stage}": EVERY | ZERO | {"deepspeed.zero_stage": stage} for stage in (2, 3)}
# The ranks that hold the same weights as the one whose bit flips, and that one, where it is not all ranks and the first.
GROUPS = {(4, "tp2"): [0, 2], (4, "pp2"): [2, 3], (2, "zero3"): [1]}
FLIPS = {(4, "alone"): 3}
NAMES = [(size, name) for size, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[tuple[int, str], list[dict]]:
    """Returns what each rank saw, by number of ranks and case."""
    found = {}
    for size, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"replicas_{size}")
        (folder / "cases.json").write_text(json.dumps(cases))
        run_workers(WORKER, size, str(folder / "cases.json"), str(folder))
        for name in cases:
            found[size, name] = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(size)]
    return found


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_comparing_raises_no_alarm_and_changes_no_bit(seen, size, name):
    for rank in seen[size, name]:
        assert rank["on"] == rank["off"]
        assert len(rank["on"]["metrics"]) == 4


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_flipped_bit_is_named_within_the_interval(seen, size, name):
    group = GROUPS.get((size, name), list(range(size)))
    ends = [rank["flipped"] for rank in seen[size, name]]
    if len(group) == 1:  # no copies
        assert all("error" not in end for end in ends)
        return
    interval = CASES[size][name]["training.replica_check_interval"]
    assert {end["error"] for end in ends} == {ends[0]["error"]}, "the ranks report different things"
    assert {(end["step"], end["code"]) for end in ends} == {(3 if interval == 3 else 2, 12)}
    message = ends[0]["error"]
    assert "decoder.final_layernorm.weight" in message
    assert f"; they were equal after step {0 if interval == 3 else 1}. Copies are compared" in message
    if len(group) > 2:
        assert message.split(": ")[1].startswith(f"rank {FLIPS.get((size, name), 0)} (")
        assert "differs from the others in decoder." in message
    else:
        assert f"rank {group[0]} (" in message and f" and rank {group[1]} (" in message
        assert "and their number does not show which is right" in message


@pytest.mark.skipif(ON_GPUS, reason="its processes compute on CPUs")
def test_run_ends_with_its_own_exit_code_and_saves_nothing_after(tmp_path):
    """A sign flips before step 5. Copies are compared in the first step, every third, and before a save: of step 6, which is not published."""
    write_dataset(tmp_path / "data", {"text": cut(20_000, base=1)}, {"text": cut(2_000, base=1)})
    settings = ["experiment=quickstart", "model.num_layers=2", "engine.distributed_optimizer=false", "precision=fp32"]
    settings += ["training.steps=12", "training.global_batch_tokens=512", "training.micro_batch_size=1"]
    settings += ["data.sequence_length=128", "evaluation.rows=2", "evaluation.at_start=false", "checkpoint.interval=2"]
    settings += [
        "training.replica_check_interval=3",
        f"data.path={tmp_path / 'data'}",
        f"output_dir={tmp_path / 'run'}",
    ]
    ended = run_ranks([str(RUN), "1", "4", *settings], ranks(2), timeout=300)
    assert [one.code for one in ended] == [12, 12], ended
    sentence = ended[0].stderr.splitlines()[-1]
    assert sentence.startswith("after step 6 data ranks hold different weights: rank 0 (")
    assert " and rank 1 (" in sentence and "decoder.layers.1.mlp.linear_fc2.weight" in sentence
    assert "; they were equal after step 4. Copies are compared before each save" in sentence
    assert not any("Traceback" in one.stderr for one in ended)
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step_00000004"
