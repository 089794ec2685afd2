"""`make quickstart`, small and run twice, with every file that it promises. test_docs.py tests the commands of the guides."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import ROOT

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the quickstart
README = (ROOT / "README.md").read_text()
VENV = Path(sys.prefix)


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those that a launcher sets, with this interpreter first on PATH."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return (
        kept | {"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"} | changes
    )


def run(*command: str | Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def test_readme_begins_with_the_two_commands() -> None:
    top = "\n".join(README.splitlines()[:16])
    assert re.search(r"^make quickstart\b", top, re.MULTILINE) and re.search(r"^make test\b", top, re.MULTILINE)
    assert len(README.splitlines()) < 100


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_targets_run_after_set_up(tmp_path: Path, target: str) -> None:
    for stamp in (".quickstart", ".dev"):
        (tmp_path / stamp).touch()
    done = run("make", "--dry-run", target, f"VENV={tmp_path}", "PYTEST_ARGS=-x")
    expected = {
        "quickstart": f"launchers/quickstart.sh --venv {tmp_path} --out outputs/quickstart",
        "test": f'OMP_NUM_THREADS=1 {tmp_path}/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu" -x',
    }
    assert done.stdout.strip() == expected[target]


def test_paths_in_the_file_map_exist() -> None:
    table = README.split("## Where things are")[1]
    for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        for path in (first, *(str(Path(first).parent / other) for other in others)):
            assert (ROOT / path).exists(), f"README.md names {path}"


@pytest.mark.parametrize("command", ["train", "evaluate", "plan", "report"])
def test_every_command_has_help(command: str) -> None:
    done = run(sys.executable, "-m", f"ssa_pretrain.{command}", "--help")
    assert done.returncode == 0 and len(done.stdout) > 100 and "Traceback" not in done.stderr


SMALL = [
    "training.steps=6",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=2",
    "data.sequence_length=256",
    "logging.interval=2",
]
SMALL += ["evaluation.rows=4", "evaluation.interval=3", "checkpoint.interval=3"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, run("launchers/quickstart.sh", "--venv", VENV, "--out", out, *SMALL, timeout=1100)


def test_quickstart_writes_every_promised_file(quickstart: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = quickstart
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (
        "report.html",
        "metrics.jsonl",
        "config.yaml",
        "environment.jsonl",
        "evaluation.json",
        "samples.json",
        "data/manifest.json",
    ):
        assert (out / name).stat().st_size > 0, name
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["mode"]) for r in records if r["kind"] == "evaluation"] == [
        (s, m) for s in (0, 3, 6) for m in ("full", "sparse")
    ]
    assert [r["step"] for r in records if r["kind"] == "checkpoint"] == [3, 6]
    assert all(math.isfinite(r["cross_entropy"]) for r in records if r["kind"] != "checkpoint")
    seconds = [r["seconds"] for r in records if r["kind"] == "train"]
    assert min(seconds) > statistics.median(seconds) / 10, f"no step is timed with its neighbour: {seconds}"
    assert "\x1b" not in done.stdout + done.stderr, "no terminal codes in a pipe"
    assert f"report: {out / 'report.html'}" in done.stdout


def test_quickstart_records_have_every_documented_key(
    quickstart: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = quickstart
    guide = (ROOT / "docs" / "metrics.md").read_text()
    tables = guide.split("## ")[1:]
    for record in (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()):
        (table,) = (table for table in tables if table.startswith(f'`"kind": "{record["kind"]}"`'))
        rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE)
        keys = {key: meaning for cell, meaning in rows for key in re.findall(r"`(\w+)`", cell)}
        always = {
            key for key, meaning in keys.items() if not meaning.startswith(("only in ", "only with ", "only if "))
        }
        assert always <= set(record), f"documented and not written: {always - set(record)}"
        assert set(record) - {"kind"} <= set(keys), "written and not documented"


def test_second_quickstart_reuses_existing_outputs(quickstart: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = quickstart
    kept = ["data/manifest.json", "data/tokenizer.json", "metrics.jsonl"]
    before = {name: (out / name).read_bytes() for name in kept}
    written = (out / "data" / "manifest.json").stat().st_mtime_ns
    done = run("launchers/quickstart.sh", "--venv", VENV, "--out", out, *SMALL, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: (out / name).read_bytes() for name in kept} == before
    assert (out / "data" / "manifest.json").stat().st_mtime_ns == written
