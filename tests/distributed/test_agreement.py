"""If one rank cannot write, every rank ends with the same message, and earlier checkpoints stay."""

import json
import socket
from pathlib import Path

import pytest

from ssa_pretrain.checkpoint.integrity import FACTS, find_damage
from support.processes import run_workers

WORKER = Path(__file__).parent / "agreement_worker.py"
REASON = "(rank 1: OSError: [Errno 28] No space left on device); earlier checkpoints are unchanged: free space and"


def is_untouched(run: Path) -> bool:
    """Returns whether the first checkpoint is the only one and is intact."""
    (first,) = [p for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")]
    return first.name == "step_00000001" and find_damage(first) is None


def test_ranks_share_hashing_and_all_report_the_failed_write(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "failed_write", str(tmp_path), timeout=300)
    assert [(tmp_path / f"read_{rank}").read_text() for rank in range(2)] == ["part_0\n", "part_1\n"]
    listed = json.loads((tmp_path / "checkpoints" / "step_00000001" / FACTS).read_text())["files"]
    assert list(listed) == ["part_0", "part_1"]
    first, second = ((tmp_path / f"message_{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith(f"step 2 could not be saved in {tmp_path / 'checkpoints'}, which has ")
    assert REASON in first
    assert is_untouched(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert {(tmp_path / f"error_{rank}").read_text() for rank in range(2)} == {"CheckpointError"}, "the run must end"


def test_ranks_that_agree_on_a_failed_write_are_in_step_and_save_again(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "agreed", str(tmp_path), timeout=300)
    assert {(tmp_path / f"error_{rank}").read_text() for rank in range(2)} == {"SaveError"}
    first, second = ((tmp_path / f"message_{rank}").read_text() for rank in range(2))
    assert first == second and REASON in first
    (found,) = (tmp_path / "checkpoints").iterdir()
    assert found.name == "step_00000003" and find_damage(found) is None


def test_rank_waiting_in_a_save_for_a_failed_rank_exits(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a worker of 2 ended with exit code 5") as caught:
        run_workers(WORKER, 2, "barrier_in_save", str(tmp_path), timeout=300)
    assert REASON in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert is_untouched(tmp_path)


def test_every_rank_raises_the_error_of_rank_0(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "rank_0_fails", str(tmp_path), timeout=300)
    assert {(tmp_path / f"message_{rank}").read_text() for rank in range(2)} == {"  output_dir=x is in use"}


def test_every_rank_names_ranks_with_different_settings_or_libraries(tmp_path: Path) -> None:
    run_workers(WORKER, 3, "differing_settings", str(tmp_path), timeout=300)
    here = socket.gethostname()
    wanted = [
        ("optim.lr", 0.5, f"rank 2 ({here}), and 0.1 on rank 0 ({here})"),
        ("version of torch", None, f"rank 2 ({here}), and 2.13 on rank 0 ({here})"),
    ]
    assert {(tmp_path / f"message_{rank}").read_text() for rank in range(3)} == {repr(wanted)}


def test_unshared_folders_are_refused_and_nothing_is_published(tmp_path: Path) -> None:
    run_workers(WORKER, 2, "separate_disks", str(tmp_path), timeout=300)
    first, second = ((tmp_path / f"message_{rank}").read_text().splitlines() for rank in range(2))
    assert f"is not the same folder for all processes: rank 1 ({socket.gethostname()}) does not see" in first[0]
    assert first[0].partition("is not one")[2] == second[0].partition("is not one")[2]
    assert "part_1, which another rank wrote, is not visible here" in first[1]
    assert "part_1, which another rank wrote, is not visible here" in second[1]
    assert not list(tmp_path.glob("*/checkpoints/step_*")) and not list(tmp_path.glob("*/.seen_*"))
