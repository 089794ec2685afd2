"""If reshaping a DeepSpeed checkpoint fails on one rank, all ranks end."""

import json
from pathlib import Path

import pytest

from support.processes import run_workers

pytest.importorskip("deepspeed")

WORKER = Path(__file__).parent / "reshape_worker.py"


def outcomes(case: str, folder: Path) -> list[str]:
    """Returns the error or result of each of two ranks."""
    folder.mkdir()
    (folder / "deepspeed.json").write_text(json.dumps({"zero_stage": 2, "tp": 1, "dp": 4}))
    run_workers(WORKER, 2, case, str(folder), timeout=300)
    return [json.loads((folder / f"outcome_{rank}").read_text()) for rank in range(2)]


def test_every_rank_raises_the_converter_failure(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    assert outcomes("convert", folder) == [f"WeightsError: {folder} could not be reshaped"] * 2


def test_failed_load_does_not_wait_for_other_ranks(tmp_path: Path) -> None:
    first, second = outcomes("load", tmp_path / "step_00000001")
    assert second == "WeightsError: a part is missing"
    assert first.startswith("RuntimeError: ")  # its peer has exited


def test_reshaped_copy_lies_in_the_run_that_loads_it_and_is_removed(tmp_path: Path) -> None:
    """A folder beside the checkpoint may be that of another branch, which is loading it."""
    another = tmp_path / ".step_00000001.universal"
    another.mkdir()
    assert outcomes("well", tmp_path / "step_00000001") == ["loaded"] * 2
    assert {p.name for p in tmp_path.iterdir()} == {another.name, "run", "step_00000001"}
    assert not list((tmp_path / "run").iterdir())
