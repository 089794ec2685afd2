"""A rank that cannot write ends all of them, with one message, and what was saved before stays."""

import json
import socket
from pathlib import Path

import pytest

from ssa_pretrain.checkpoint.integrity import FACTS, find_damage
from support.processes import run_workers

WORKER = Path(__file__).parent / "agreement_worker.py"
REASON = "(rank 1: OSError: [Errno 28] No space left on device); earlier checkpoints are unchanged: free space and"


def is_untouched(run: Path) -> bool:
    """Returns whether only the first checkpoint is there, and intact."""
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
    with pytest.raises(AssertionError, match="a worker of 2 ended with exit code 5") as caught:
        run_workers(WORKER, 2, "inside", str(tmp_path), timeout=300)
    assert REASON in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert is_untouched(tmp_path)


def test_the_first_rank_s_refusal_is_every_rank_s(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "first", str(tmp_path), timeout=300)
    assert {(tmp_path / f"said_{rank}").read_text() for rank in range(2)} == {"  output_dir=x is in use"}


def test_ranks_with_other_settings_or_libraries_are_named_on_all(tmp_path: Path) -> None:
    run_workers(WORKER, 3, "unlike", str(tmp_path), timeout=300)
    here = socket.gethostname()
    wanted = [
        ("optim.lr", 0.5, f"rank 2 ({here}), and 0.1 on rank 0 ({here})"),
        ("version of torch", None, f"rank 2 ({here}), and 2.13 on rank 0 ({here})"),
    ]
    assert {(tmp_path / f"said_{rank}").read_text() for rank in range(3)} == {repr(wanted)}


def test_folders_that_are_not_shared_are_refused_and_no_part_of_a_checkpoint_is_published(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "apart", str(tmp_path), timeout=300)
    first, second = ((tmp_path / f"said_{rank}").read_text().splitlines() for rank in range(2))
    assert f"is not the same folder for all processes: rank 1 ({socket.gethostname()}) does not see" in first[0]
    assert first[0].partition("is not one")[2] == second[0].partition("is not one")[2]
    assert "part_1, which another rank wrote, is not visible here" in first[1]
    assert "part_1, which another rank wrote, is not visible here" in second[1]
    assert not list(tmp_path.glob("*/checkpoints/step_*")) and not list(tmp_path.glob("*/.seen_*"))
