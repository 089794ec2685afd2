"""The program that measures for the planner: its cases, and that the planner reads what it writes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ssa_pretrain.planning.calibration import calibration, part_bytes, terms
from ssa_pretrain.planning.measured import config_of, measured_runs
from support.processes import ROOT


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """Returns the program as a module."""
    spec = importlib.util.spec_from_file_location("measure_plan", ROOT / "tests" / "benchmarks" / "measure_plan.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cases_are_configurations_of_the_1b_model(program: ModuleType) -> None:
    cases = program.default_cases("llama_1b")
    configs = [config_of(case.settings) for case in cases]
    assert len({case.settings + case.work for case in cases}) == len(cases) == 16
    assert {config.data.sequence_length for config in configs} == {8192, 32768}
    assert {str(config.attention.method) for config in configs} == {"full", "moba", "ssa"}
    assert {str(config.engine.recompute) for config in configs} == {"none", "selective", "full"}
    assert {config.training.micro_batch_size for config in configs} == {1, 2}


def test_case_of_the_command_line(program: ModuleType) -> None:
    case = program.parse_case("step 8 model=llama_1b data.sequence_length=8192 parallel.cp=2")
    assert (case.work, case.microbatches, config_of(case.settings).parallel.cp) == ("step", 8, 2)
    for text in ("run 8 model=tiny", "step x model=tiny", "step 8 parallel.cp=2"):
        with pytest.raises(
            SystemExit, match="must be pass or step, a number of microbatches, and settings with model="
        ):
            program.parse_case(text)


def test_planner_reads_what_it_writes(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of a run whose peak and time are the planned ones has no error."""
    monkeypatch.setattr(program, "_device_name", lambda: "NVIDIA H200")
    planned = next(run for run in calibration().runs if run.seconds and run.world_size == 1)
    parts = part_bytes(planned)
    seconds = sum(calibration().factors[term] * ideal for term, ideal in terms(planned).items())
    settings = "model=llama_1b data.sequence_length=8192 training.micro_batch_size=2 attention.method=full"
    case = program.Case("8k full", "pass", 1, settings)
    measurement = program.Measurement(tmp_path / "deep" / "runs.csv", rounds=1)
    for _ in range(2):
        measurement._write(case, seconds, {"peak": sum(parts.values()), **parts}, world_size=1)
    first, second = measured_runs(tmp_path / "deep" / "runs.csv")
    assert first == second and first.hardware.name == "h200"
    assert first.seconds == pytest.approx(seconds, rel=1e-3)
    assert first.part_bytes == pytest.approx(parts, rel=1e-2)
    assert "(+0.0%)" in capsys.readouterr().out.replace("-0.0%", "+0.0%")
    monkeypatch.setattr(program, "_device_name", lambda: "NVIDIA T4")
    with pytest.raises(SystemExit, match="NVIDIA T4 has no file in conf/hardware"):
        measurement._write(case, seconds, {}, world_size=1)
