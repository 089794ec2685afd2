"""The cost model against the measured runs, and its fit against another fit."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.config import CONF
from ssa_pretrain.config.hardware import HardwareConfig
from ssa_pretrain.planning.calibration import PRIOR, calibration, fit, part_bytes, terms
from ssa_pretrain.planning.documents import document_lengths
from ssa_pretrain.planning.estimate_table import measured_table
from ssa_pretrain.planning.flops import PrecisionName, causal_pairs, peak_flops
from ssa_pretrain.planning.measured import COLUMNS, PATH, config_of, hardware_of, measured_runs

RUNS = calibration().runs


def test_every_measured_time_is_within_10_percent() -> None:
    found = calibration()
    wrong = {
        run.settings: error for run, error in zip(RUNS, found.time_errors, strict=True) if error and abs(error) > 0.1
    }
    assert not wrong
    assert sum(error is not None for error in found.time_errors) >= 60


def test_every_measured_peak_and_part_is_within_5_percent() -> None:
    found = calibration()
    wrong = {
        run.settings: error for run, error in zip(RUNS, found.memory_errors, strict=True) if error and abs(error) > 0.05
    }
    for run in RUNS:
        planned = part_bytes(run)
        for part, size in run.part_bytes.items():
            if abs(planned[part] / size - 1) > 0.05:
                wrong[f"{part} of {run.settings}"] = planned[part] / size - 1
    assert not wrong
    assert sum(error is not None for error in found.memory_errors) >= 40


def test_single_gpu_times_of_each_method_are_within_5_percent() -> None:
    """The runs that all other estimates build on: the 1B model at 8k and 32k."""
    found = calibration()
    errors = [
        error
        for run, error in zip(RUNS, found.time_errors, strict=True)
        if run.world_size == 1 and not run.has_optimizer and run.documents == "whole" and error is not None
    ]
    assert len(errors) > 20
    assert max(map(abs, errors)) < 0.05


def test_every_run_has_its_provenance() -> None:
    """The page exists, and has the section, the commit and the measured numbers that are not derived from ratios."""
    for run in RUNS:
        page, _, section = run.source.partition(" ")
        if page == "measure_plan.py,":
            continue
        text = (CONF.parent / page).read_text(encoding="utf-8")
        assert not section or f"# {section}\n" in text, run.source
        if run.peak_bytes:
            assert f"{run.peak_bytes / 2**30:.1f}" in text, run.settings
    for line in PATH.read_text(encoding="utf-8").splitlines()[1:]:
        assert re.match(r"2026-\d\d-\d\d,[0-9a-f]{7,40},(h100|h200|a100|b200|gb200),", line)


def test_error_of_a_run_that_is_left_out_equals_that_of_a_fit_without_it() -> None:
    found = calibration()
    for index in (0, 20, len(RUNS) - 1):
        others = [run for place, run in enumerate(RUNS) if place != index]
        factors, run = fit(others).factors, RUNS[index]
        planned = sum(factors[term] * seconds for term, seconds in terms(run).items())
        assert planned / run.seconds - 1 == pytest.approx(found.left_out_errors[index], abs=1e-6)


def test_fit_finds_the_factors_that_made_the_times() -> None:
    """With times made by known factors, those that many runs share come back, whatever the priors are."""
    true = {term: factor * 1.3 for term, factor in PRIOR.items()}
    made = [
        replace(run, seconds=sum(true[term] * seconds for term, seconds in terms(run).items()))
        for run in RUNS
        if run.seconds
    ]
    found = fit(made)
    for term in ("products", "full stream", "memory traffic"):
        assert found.factors[term] == pytest.approx(true[term], rel=0.03)
    assert max(abs(error) for error in found.time_errors if error is not None) < 0.01


def test_factors_are_possible() -> None:
    factors = calibration().factors
    assert all(factor > 0 for factor in factors.values())
    assert 1.0 < factors["products"] < factors["full stream"] < factors["sampled full stream"]
    assert all(factors[link] >= 1.0 for link in ("tensor parallelism", "data parallelism", "communication"))


def test_table_has_every_run_beside_its_estimate() -> None:
    table = measured_table(calibration())
    assert all(run.settings in table for run in RUNS)
    assert "2.62  full stream" in table or re.search(r"\d\.\d\d  full stream", table)
    assert re.search(r"fitted to \d+ measured runs: times within \d\.\d%", table)


def test_parts_of_a_measured_peak_are_compared(tmp_path: Path) -> None:
    """The form in which measure_plan.py writes a run with parts."""
    path = tmp_path / "runs.csv"
    values = ["2026-11-29", "abcdef0", "h200", "1", "pass", "1", "model=llama_1b data.sequence_length=8192", "whole"]
    path.write_text(
        f"{','.join(COLUMNS)}\n{','.join([*values, '150.0', '23.0', '2.257', '4.514', '4.514', '12.4', 'here'])}\n"
    )
    (run,) = measured_runs(path)
    planned = part_bytes(run)
    assert {part: size / planned[part] for part, size in run.part_bytes.items()} == pytest.approx(
        {"weights": 1.0, "gradients": 1.0, "optimizer": 1.0, "activations": 1.0}, rel=0.01
    )
    assert "optimizer" in measured_table(fit([run]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"must have the columns date,commit"),
        (
            f"{','.join(COLUMNS)}\n2026-11-29,a,h200,1,pass,1,model=llama_1b atention.method=ssa,whole,1,,,,,,x\n",
            "line 2.*atention",
        ),
    ],
)
def test_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        measured_runs(path)


def test_settings_are_read_as_on_the_command_line() -> None:
    config = config_of(
        "model=llama_300m parallel.tp=2 parallel.sequence_parallel=true attention.counterpart_share=0.25 optim.lr=1e-3"
    )
    assert (config.model.name, config.parallel.tp, config.parallel.sequence_parallel) == ("llama_300m", 2, True)
    assert (config.attention.counterpart_share, config.optim.lr) == (0.25, 1e-3)


@pytest.mark.parametrize(("rule", "mean_keys"), [("geometric:1024", 889), ("lognormal:960", 946), ("cut:5", 8192 / 6)])
def test_typical_documents_have_the_keys_of_the_benchmarks(rule: str, mean_keys: float) -> None:
    """docs/performance.md counts 889 and 946 keys per query for the benchmark's short and real documents in rows of 8k."""
    lengths = document_lengths(rule, 8192)
    assert sum(lengths) % 8192 == 0 and min(lengths) >= 1
    assert np.isclose(sum(map(causal_pairs, lengths)) / sum(lengths), mean_keys, rtol=0.06)
    assert lengths == document_lengths(rule, 8192)


def test_rule_of_documents_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="documents=uniform:3 must be whole, lognormal:MEAN"):
        document_lengths("uniform:3", 8192)


@pytest.mark.parametrize("path", sorted((CONF / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_hardware_files_agree_with_the_peaks_by_which_mfu_is_counted(path: Path) -> None:
    hardware = hardware_of(path.stem)
    assert hardware.name == path.stem and hardware.problems() == []
    assert hardware.bf16_tflops * 1e12 == pytest.approx(peak_flops(hardware.gpu, PrecisionName.bf16))
    assert hardware.fp8_tflops * 1e12 == pytest.approx(peak_flops(hardware.gpu, PrecisionName.fp8) or 0.0)
    for line in path.read_text(encoding="utf-8").splitlines():
        key = line.partition(":")[0]
        if line[:1] != "#" and key not in ("name", "gpus_per_node", "nvlink_gpus"):
            assert "  # " in line, f"{path.stem}: {key} has no source"


def test_defaults_are_the_h100() -> None:
    assert HardwareConfig() == hardware_of("h100")
