"""Each rank writes its own boxes of the optimizer's tensors; the checkpoint is the one that core would gather, and either reads the other's."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from support.processes import run_workers

pytestmark = pytest.mark.timeout(600)
WORKER = Path(__file__).parent / "optimizer_shards_worker.py"
CASES = {
    "dp2": {"precision.name": "bf16"},
    "tp2.sequence_parallel": {"parallel.tp": 2, "parallel.sequence_parallel": True},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    run_workers(WORKER, 2, str(folder), json.dumps(CASES), timeout=400)
    return folder


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's tensors, each put together from its parts."""
    state: dict = {}
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_core_gathers(case, written):
    own, core = whole_tensors(written / case / "own"), whole_tensors(written / case / "core")
    assert own.keys() == core.keys() and sum(key.startswith("optimizer.state.exp_avg.") for key in own) > 5
    for key, value in own.items():
        assert value.dtype == core[key].dtype and torch.equal(value, core[key]), key


@pytest.mark.parametrize("case", CASES)
def test_training_continues_to_the_bit_whoever_wrote_and_whoever_reads(case, written):
    for rank in range(2):
        results = json.loads((written / case / f"results_{rank}.json").read_text())
        assert all(found == results["live"] for found in results.values()), results


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_write_about_half_of_the_optimizer(case, written):
    by_rank = [sum(p.stat().st_size for p in (written / case / "own").glob(f"__{rank}_*")) for rank in range(2)]
    assert max(by_rank) < 0.65 * sum(by_rank), by_rank
