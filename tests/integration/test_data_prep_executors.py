"""Slurm arrays and Ray write the same shards as this machine does, and a failing task ends the command and is named.

Ray is a real cluster of several processes on this machine. Slurm is real if a controller answers `sinfo` and
has a partition. Elsewhere programs of the same names replace it: they read the batch script and run the array's tasks as processes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.shards import tokenizing
from data_prep.shards.executors.step import run_task
from ssa_pretrain.data.manifest import load_manifest

pytestmark = pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed (extra cluster)")

SBATCH = """#!{python}
# Reads what datatrove writes: #SBATCH --array=0-N, --output=FILE; runs every task, two at a time, in the background.
import os, re, subprocess, sys
from pathlib import Path
script = sys.argv[-1]
text = Path(script).read_text()
state = Path({state!r})
job = str(len(list(state.iterdir())) + 1)
kept = state / (job + ".sh")
kept.write_text(text)
last = int(re.search(r"#SBATCH --array=0-(\\d+)", text)[1])
output = re.search(r"#SBATCH --output=(.*)", text)[1]
export = dict(v.split("=", 1) for a in sys.argv[1:-1] if a.startswith("--export=ALL,") for v in a[13:].split(","))
runner = (
    "import os, subprocess, sys\\n"
    "for task in range(int(sys.argv[2]) + 1):\\n"
    "    with open(sys.argv[3].replace('%A', sys.argv[4]).replace('%a', str(task)), 'w') as log:\\n"
    "        env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST='here')\\n"
    "        subprocess.run(['bash', sys.argv[1]], env=env, stdout=log, stderr=log)\\n"
    "os.rename(sys.argv[1], sys.argv[1] + '.done')\\n"
)
subprocess.Popen(
    [sys.executable, "-c", runner, str(kept), str(last), output, job], env=dict(os.environ, **export), start_new_session=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
print("Submitted batch job", job)
"""
SQUEUE = """#!{python}
import sys
from pathlib import Path
job = sys.argv[sys.argv.index("--jobs") + 1]
print("RUNNING" if (Path({state!r}) / (job + ".sh")).exists() else "", end="")
"""
SCANCEL = """#!{python}
import sys
from pathlib import Path
(Path({state!r}) / "cancelled").write_text(sys.argv[1])
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "${@: -1}"  # show hostnames LIST, of one host
"""


def has_slurm() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format", "%P %a"], capture_output=True, text=True, check=False, timeout=5
        )
    except subprocess.TimeoutExpired:
        return False
    return "cpu* up" in done.stdout


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts Slurm's programs on PATH and returns which ones: real or stand-in."""
    if has_slurm():
        return "real"
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for name, text in (
        ("sbatch", SBATCH),
        ("squeue", SQUEUE),
        ("scancel", SCANCEL),
        ("srun", SRUN),
        ("scontrol", SCONTROL),
    ):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable, state=str(tmp_path / "jobs")) if "{state" in text else text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return "stand-in"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"document {n} of keys and blocks " * (1 + n % 7)}) + "\n" for n in range(300)]
    path.write_text("".join(lines))
    return path


def settings(corpus: Path, out: str, *more: str) -> list[str]:
    return [
        "stage=prepare",
        f"out={corpus.parent / out}",
        f"cache={corpus.parent / 'cache'}",
        "source=jsonl",
        f"source.paths=[{corpus}]",
        "tokenizer.vocab_size=512",
        "split.heldout_fraction=0.2",
        "shard_mb=0.01",
        *more,
    ]


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in [*sorted((root / "train").iterdir()), *sorted((root / "heldout").iterdir()), root / "manifest.json"]:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


RAY = ("executor=ray", "executor.tasks=3", "executor.workers=2", "executor.mem_per_cpu_gb=0.2")
SLURM = ("executor=slurm", "executor.partition=cpu", "executor.tasks=3")


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra cluster)")
def test_ray_makes_the_same_dataset(corpus, monkeypatch):
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "300")  # a busy machine starts a cluster slowly
    assert main(settings(corpus, "local")) == 0
    assert main(settings(corpus, "ray", *RAY)) == 0
    assert digest(corpus.parent / "ray") == digest(corpus.parent / "local")
    assert len(load_manifest(corpus.parent / "ray").splits["train"]) > 3


def test_slurm_makes_the_same_dataset(corpus, slurm):
    assert main(settings(corpus, "local")) == 0
    assert main(settings(corpus, "slurm", *SLURM)) == 0
    assert digest(corpus.parent / "slurm") == digest(corpus.parent / "local"), slurm


def test_queued_jobs_are_picked_up_by_a_later_command(corpus, slurm, capsys):
    arguments = settings(corpus, "slurm", *SLURM)
    assert main([*arguments, "executor.wait=false"]) == 0
    assert "the jobs are queued; run the same command again" in capsys.readouterr().err
    assert not (corpus.parent / "slurm" / "manifest.json").exists()
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "waiting for Slurm job" in error or "reusing" in error
    assert len(list((corpus.parent / "slurm" / "work" / "runs").iterdir())) <= 2
    assert load_manifest(corpus.parent / "slurm")


def test_files_of_running_tasks_are_left_alone(corpus, tmp_path, monkeypatch):
    """A second command neither removes what a task is writing nor the record that it has just written."""
    root, running = corpus.parent / "local", tmp_path / "running"
    assert main(settings(corpus, "local")) == 0
    (root / "manifest.json").unlink()
    record, *_ = sorted((root / "work" / "shards").glob("*.json"))
    content, unfinished = record.read_bytes(), root / "work" / "shards" / "train" / f"{record.stem}.bin.1.tmp"
    record.unlink()
    unfinished.touch()
    running.touch()
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n[ -e {running} ] && echo RUNNING\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (root / "work" / "slurm.json").write_text(json.dumps({"job_id": "1", "run": str(root / "work" / "runs" / "1")}))
    find_records = tokenizing._records

    def find_before_a_task_ends(*arguments):
        found = find_records(*arguments)
        record.write_bytes(content)
        return found

    monkeypatch.setattr(tokenizing, "_records", find_before_a_task_ends)
    assert main(settings(corpus, "local", *SLURM, "executor.wait=false")) == 0
    assert unfinished.exists() and record.read_bytes() == content
    running.unlink()
    assert main(settings(corpus, "local")) == 0
    assert not unfinished.exists() and load_manifest(root)


def test_failing_task_ends_the_command_with_its_shard(corpus, slurm, capsys):
    with open(corpus, "a") as file:
        file.write('{"text": \n')
    own = ["tokenizer=file", f"tokenizer.path={tokenizer(corpus)}", "tokenizer.eos_token='<|end_of_text|>'"]
    arguments = [a for a in settings(corpus, "slurm", *SLURM) if not a.startswith("tokenizer")]
    started = time.monotonic()
    assert main([*arguments, *own, "backend=hf"]) == 4  # hf needs no sample, so the line is met by a task alone
    error = capsys.readouterr().err
    assert f"error: {corpus}:301: the line is not JSON" in error and "(shard text_000" in error
    assert time.monotonic() - started < 300  # a busy machine takes long to start three interpreters
    assert not (corpus.parent / "slurm" / "manifest.json").exists()


def tokenizer(corpus: Path) -> Path:
    """Returns the path of a tokenizer that was not trained on the corpus."""
    good = corpus.with_name("good.jsonl")
    good.write_text("".join(corpus.read_text().splitlines(keepends=True)[:200]))
    assert main(settings(good, "good")) == 0
    return corpus.parent / "good" / "tokenizer.json"


def test_tasks_share_the_shards(corpus, slurm, tmp_path):
    assert main(settings(corpus, "slurm", *SLURM)) == 0
    root = corpus.parent / "slurm"
    (run,) = (root / "work" / "runs").iterdir()
    records = sorted((root / "work" / "shards").glob("*.json"))
    for path in records:
        path.unlink()
    run_task(run, 1, 3)
    again = sorted((root / "work" / "shards").glob("*.json"))
    assert again == records[1::3]


def test_missing_programs_and_packages_are_named(corpus, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(settings(corpus, "x", *SLURM)) == 3
    assert "executor=slurm needs sbatch, which is not on PATH" in capsys.readouterr().err
    monkeypatch.setattr("data_prep.shards.executors.ray_cluster.find_spec", lambda name: None)
    assert main(settings(corpus, "x", *RAY)) == 3
    assert "executor=ray needs ray; install it with `pip install -e '.[cluster]'`" in capsys.readouterr().err
