"""Wrong arguments make the benchmark exit with one sentence and code 3, before it measures anything."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from support.processes import ROOT

FOLDER = ROOT / "tests" / "benchmarks" / "data_prep"


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_prep_benchmark", FOLDER / "__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_runs_as_a_program():
    run = [sys.executable, str(FOLDER)]
    with_help = subprocess.run([*run, "--help"], capture_output=True, text=True, check=False)
    assert with_help.returncode == 0 and "python tests/benchmarks/data_prep text.jsonl" in with_help.stdout
    assert subprocess.run(run, capture_output=True, check=False).returncode == 3


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["none.jsonl"], "none.jsonl does not exist; name a file of JSON lines first"),
        (["bad.jsonl"], "bad.jsonl:1: no key 'text'"),
        (["a.jsonl.gz"], "a.jsonl.gz is compressed, which not every row can read; unpack it first"),
        (["a.jsonl", "rounds=x"], "rounds=x must be a whole number from 1; try rounds=1"),
        (["a.jsonl", "processes=0"], "processes=0 must be a whole number from 1"),
        (["a.jsonl", "round=1"], "round=1 is not an option; the options are work=, rounds="),
        (["a.jsonl", "peers=/none/python"], "peers=/none/python does not exist; correct the path"),
        (["a.jsonl", "rows=raw hf,foo"], "rows=foo is not a row; the rows are raw hf, raw tiktoken"),
    ],
)
def test_wrong_arguments_exit_with_code_3(benchmark, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "llama3_json", lambda *_: tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n')
    assert benchmark.main(arguments) == 3
    output = capsys.readouterr().err
    assert message in output and output.startswith("error: ") and output.count("\n") == 1, output
