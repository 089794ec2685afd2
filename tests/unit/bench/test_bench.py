"""The benchmark's options, ratios and tables, and a complete benchmark of a tiny model in a separate process."""

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ssa_pretrain.bench import __main__ as bench
from ssa_pretrain.bench.goals import GOALS, Goal
from ssa_pretrain.bench.options import read_options
from ssa_pretrain.bench.tables import Result, append, ratio, read, verdict, write_ratios
from support.processes import ROOT


def result(variant: str, rate: float | None, ms: float = 10.0, peak: float | None = None) -> Result:
    return Result(
        case="8k",
        model="llama_1b",
        variant=variant,
        ms=ms,
        spread=0.0,
        tokens_per_second_per_gpu=rate,
        model_tflops_per_gpu=None,
        mfu=None,
        peak_gib=peak,
        world_size=1,
        device="NVIDIA H200",
        versions="v",
        command="c",
    )


def test_command_line_options():
    options = read_options(["cases=8k,32k", "length=64", "rows=1"], 1)
    assert options.cases == ("8k", "32k") and options.length == 64 and options.rows == 1 and options.model == "llama_1b"
    assert read_options([], 2).cases == ("dp2", "tp2", "tp2_overlap")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cases=9k"], "cases=9k must be among 8k, 32k, optimizer, fp8, recompute with 1 process"),
        (["cases=dp2"], "need torchrun --nproc-per-node 2"),
        (["rounds=0"], "rounds=0 must be a positive whole number"),
        (["model=huge"], "model=huge is not a file in conf/model; try .*llama_1b"),
        (["--halp"], "'--halp' is not an option; the options are cases=, model="),
        (["precision=fp8"], "precision=fp8 must be bf16 or fp32"),
    ],
)
def test_bad_command_line_prints_one_line(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 3 and re.fullmatch(f"ssa_pretrain.bench: .*{sentence}.*\n", capsys.readouterr().err)


def test_ratios_and_verdicts(tmp_path):
    results = {r.variant: r for r in (result("a", 90.0, 5.0, 12.0), result("b", 100.0, 100.0, 10.0), result("c", None))}
    faster = Goal(label="x", over="a", under="b", must=0.91, aim=0.95)
    assert ratio(faster, results) == pytest.approx(0.9) and verdict(faster, 0.9) == "missed"
    assert [verdict(faster, v) for v in (0.92, 0.96)] == ["must reached", "aim reached"]
    leaner = Goal(label="x", over="a", under="b", of="memory", must=1.25, aim=1.15)
    assert ratio(leaner, results) == pytest.approx(1.2) and verdict(leaner, 1.2) == "must reached"
    assert ratio(Goal(label="x", over="a", under="b", of="time"), results) == pytest.approx(0.05)
    assert ratio(Goal(label="x", over="c", under="b"), results) is None
    assert ratio(Goal(label="x", over="z", under="b"), results) is None
    append(tmp_path, [result("full 8k", 50.0), result("plain 8k", 48.0)])
    append(tmp_path, [result("full 8k", 51.0)])  # the newest counts
    text = write_ratios(tmp_path, read(tmp_path))
    assert f"| full over plain megatron-core, 8k | {51 / 48:.3f} | ≥ 1 | ≥ 1.05 | aim reached |" in text
    other = {name: replace(r, device="NVIDIA A100") for name, r in read(tmp_path).items()}
    assert f"| full over plain megatron-core, 8k | {51 / 48:.3f} |  |  |  |" in write_ratios(tmp_path, other)


def test_goals_name_existing_variants():
    assert len({g.label for g in GOALS}) == len(GOALS)


def test_benchmark_runs_on_a_cpu(tmp_path):
    cases = ["8k", "optimizer"]
    command = [
        "-m",
        "ssa_pretrain.bench",
        f"cases={','.join(cases)}",
        "model=tiny",
        "length=64",
        "rows=1",
        "rounds=1",
        "runs=1",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *command, "precision=fp32", f"out={tmp_path}"],
        env=environment, capture_output=True, text=True, cwd=ROOT, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open() as file:
        found = {line["variant"]: line for line in csv.DictReader(file)}
    wanted = {"plain 8k", "full 8k", "ssa 8k", "moba 8k", "full 8k short", "ssa 8k short", "ssa step", "optimizer"}
    assert set(found) == wanted and all(float(line["ms"]) > 0 for line in found.values())
    assert "ssa over full, 8k" in done.stdout and "optimizer's share" in done.stdout
