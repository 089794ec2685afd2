"""A rank that cannot write ends all of them, with one message, and what was saved before stays."""

import json
from pathlib import Path

import pytest
from processes import run_workers

from ssa_pretrain.checkpoint import FACTS, find_damage

WORKER = Path(__file__).parent / "agreement_worker.py"
REASON = "(rank 1: OSError: [Errno 28] No space left on device); earlier checkpoints are as they were: free space and"


def is_untouched(run: Path) -> bool:
    """Whether the first checkpoint alone is there, whole."""
    (first,) = [p for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")]
    return first.name == "step_00000001" and find_damage(first) is None


def test_ranks_share_the_hashing_and_all_get_the_message_of_the_one_that_could_not_write(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "beside", str(tmp_path), timeout=300)
    assert [(tmp_path / f"read_{rank}").read_text() for rank in range(2)] == ["part_0\n", "part_1\n"]
    listed = json.loads((tmp_path / "checkpoints" / "step_00000001" / FACTS).read_text())["files"]
    assert list(listed) == ["part_0", "part_1"]
    first, second = ((tmp_path / f"said_{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith(f"step 2 could not be saved in {tmp_path / 'checkpoints'}, which has ")
    assert REASON in first
    assert is_untouched(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_rank_that_waits_inside_the_save_for_the_failed_one_is_ended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a worker of 2 left with 5") as caught:
        run_workers(WORKER, 2, "inside", str(tmp_path), timeout=300)
    assert REASON in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert is_untouched(tmp_path)


def test_the_first_rank_s_refusal_is_every_rank_s(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "first", str(tmp_path), timeout=300)
    assert {(tmp_path / f"said_{rank}").read_text() for rank in range(2)} == {"  output_dir=x is in use"}
