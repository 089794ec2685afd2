"""What every command shares: --help, --version, closed pipes, bad arguments; and the benchmark refuses cases too large for the machine."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from data_prep.cli import main as data_prep
from ssa_pretrain.bench import __main__ as bench
from ssa_pretrain.bench.options import read_options, require_small
from ssa_pretrain.cli import read_config
from ssa_pretrain.launch.__main__ import main as launch
from ssa_pretrain.report import compare
from ssa_pretrain.report.__main__ import main as report
from support.processes import ROOT

PRINTING = {
    "ssa_pretrain.train": ["--help"],
    "ssa_pretrain.evaluate": ["--version"],
    "ssa_pretrain.plan": ["experiment=ssa_1b_8k"],
    "ssa_pretrain.bench": ["--help"],
    "ssa_pretrain.experiments": ["--help"],
    "ssa_pretrain.report": ["--help"],
    "ssa_pretrain.launch": ["--help"],
    "ssa_pretrain.doctor": ["--help"],
    "data_prep": ["--help"],
}


@pytest.fixture(scope="module")
def closed_pipe_results() -> dict[str, tuple[int, str]]:
    """Returns the exit code and stderr of each printing command, --cfg and --explain included, whose pipe is closed before it prints."""
    commands = {module: [module, *arguments] for module, arguments in PRINTING.items()}
    commands |= {"--cfg": ["ssa_pretrain.train", "--cfg", "job"], "--explain": ["ssa_pretrain.train", "--explain"]}
    commands |= {"data_prep --cfg": ["data_prep", "--cfg", "job"]}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    started = {}
    for name, command in commands.items():
        read, write = os.pipe()
        os.close(read)
        arguments = [sys.executable, "-m", *command]
        started[name] = subprocess.Popen(
            arguments, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        os.close(write)
    return {name: (process.wait(120), process.stderr.read()) for name, process in started.items() if process.stderr}


@pytest.mark.parametrize("name", [*PRINTING, "--cfg", "--explain", "data_prep --cfg"])
def test_closed_pipe_causes_no_traceback(name: str, closed_pipe_results: dict[str, tuple[int, str]]) -> None:
    code, errors = closed_pipe_results[name]
    assert errors == ""
    assert code in (0, 141)


def test_help_exits_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    assert bench.main() is None
    assert "a file in conf/model" in capsys.readouterr().out
    assert compare.main() is None
    assert "markdown table" in capsys.readouterr().out
    assert [launch(words, {}) for words in (["--help"], ["torchrun", "--help"], ["stages", "-h"])] == [0, 0, 0]
    with pytest.raises(SystemExit) as left:
        report(["--help"])
    assert left.value.code == 0
    examples = {
        "train": "experiment=quickstart optim.lr=2e-3",
        "evaluate": "outputs/quickstart evaluation.rows=8",
        "plan": "experiment=ssa_1b_8k hardware=h100 nodes=8",
    }
    for entry, example in examples.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            read_config(entry, ["--help"])
        assert left.value.code == 0
        assert f"\n  python -m ssa_pretrain.{entry} {example}\n" in capsys.readouterr().out


def test_missing_or_bad_arguments_exit_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert [launch([], {}), launch(["slurm"], {})] == [3, 3]
    assert (
        "ssa_pretrain.launch: slurm is not a launcher; try torchrun, deepspeed, quickstart, stages or render\n"
        in capsys.readouterr().err
    )
    assert data_prep(["--verify=full", "out=x"]) == 3
    line = "  --verify=full is not a flag: settings are written key=value, without dashes; try verify=full"
    assert capsys.readouterr().err.splitlines()[1] == line


def test_version_is_the_project_version(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in ("train", "evaluate", "plan"):
        with pytest.raises(SystemExit) as left:
            read_config(entry, ["--version"])
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith(f"ssa_pretrain {version('ssa-pretrain')} (python 3.")
    assert data_prep(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"data_prep {version('ssa-pretrain')} (python 3.")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["cases=optimizer"],
        ["model=llama_300m", "length=64"],
        ["model=tiny"],
        ["model=tiny", "length=2048", "cases=32k"],
        ["model=tiny", "length=2048", "cases=share"],
        ["model=tiny", "length=512", "cases=share_128k"],
    ],
)
def test_benchmark_refuses_large_cases_without_a_gpu(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 3
    error = capsys.readouterr().err
    advice = "for a small case on the CPU try cases=8k model=tiny length=256 rows=1 precision=fp32\n"
    assert "needs a GPU, and torch sees none; " in error and error.endswith(advice) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_case_advised_by_the_benchmark_is_small_enough() -> None:
    require_small(read_options(["cases=8k", "model=tiny", "length=256", "rows=1", "precision=fp32"], 1))
