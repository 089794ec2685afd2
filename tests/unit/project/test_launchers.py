"""launchers/*.sh: the exact commands of a dry run, and the messages for bad flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import ROOT


def environment_without_make() -> dict[str, str]:
    """Returns this process's variables without those that tell make that it runs inside make: `make test` started the tests."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "OUT", "VENV")
    }


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher from the repository's root, with the given variables and those of this process that torchrun does not read."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", str(ROOT / "launchers" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)


QUICKSTART = """\
.venv/bin/python -m data_prep source=quickstart tokenizer=bpe4k out=outputs/quickstart/data
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 -m ssa_pretrain.train parallel=tp2 \
experiment=quickstart output_dir=outputs/quickstart data.path=outputs/quickstart/data
.venv/bin/python -m ssa_pretrain.evaluate evaluation.rows=128 experiment=quickstart output_dir=outputs/quickstart \
data.path=outputs/quickstart/data
.venv/bin/python -m ssa_pretrain.report outputs/quickstart
"""


def commands(text: str) -> str:
    """Returns a dry run's commands without trailing spaces."""
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def test_quickstart_prints_its_four_commands() -> None:
    done = call("quickstart.sh", "--dry-run")
    assert done.returncode == 0 and commands(done.stdout) == QUICKSTART
    headings = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert [heading[:5] for heading in headings] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_quickstart_passes_settings_and_folders_on() -> None:
    done = call("quickstart.sh", "--venv", "/v e", "--out", "o", "--dry-run", "training.steps=3", "name=a b")
    lines = commands(done.stdout).splitlines()
    assert lines[0] == "'/v e/bin/python' -m data_prep source=quickstart tokenizer=bpe4k out=o/data"
    for line in lines[1:3]:
        assert line.endswith("experiment=quickstart output_dir=o data.path=o/data training.steps=3 'name=a b'")
    assert lines[3].endswith("-m ssa_pretrain.report o")


def test_quickstart_reports_a_bad_setting_before_it_starts_anything(tmp_path: Path) -> None:
    done = call(
        "quickstart.sh",
        "--venv",
        sys.prefix,
        "--out",
        str(tmp_path / "out"),
        "optim.lrr=1",
        PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}",
    )
    assert done.returncode == 3 and done.stderr.count("optim.lr?") == 1
    assert "[1/4]" not in done.stderr and not (tmp_path / "out").exists()


def test_torchrun_reports_a_bad_setting_once_without_a_traceback() -> None:
    done = call(
        "torchrun.sh",
        "--python",
        sys.executable,
        "--nproc-per-node",
        "2",
        "experiment=quickstart",
        "optim.lrr=1",
        PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}",
    )
    assert done.returncode == 3
    assert done.stderr.count("optim.lr?") == 1
    assert "Traceback" not in done.stderr


def test_quickstart_stops_at_a_failed_step(tmp_path: Path) -> None:
    """A failing interpreter replaces any failing program: nothing after it is started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        '#!/bin/sh\n[ "$1" = -c ] || [ "$2" = ssa_pretrain.plan ] && exit 0\n'
        f'[ "$2" = ssa_pretrain.launch ] && exec {sys.executable} "$@"\necho "$2"\nexit 4\n'
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    done = call("quickstart.sh", "--venv", str(tmp_path))
    assert (done.returncode, done.stdout) == (4, "data_prep\n")


def test_torchrun_dry_run_ends_with_the_plan_of_the_whole_job() -> None:
    arguments = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "4",
        "--rdzv-endpoint",
        "h:1",
        "--python",
        sys.executable,
        "--dry-run",
    ]
    done = call("torchrun.sh", *arguments, "experiment=ssa_1b_8k")
    assert done.returncode == 0, done.stderr
    assert "8 processes" in done.stdout and "100,002,693,120 tokens" in done.stdout
    assert (
        "h:1" in done.stdout and "HOST" not in done.stdout and "\ncommand" not in done.stdout
    )  # one command, the exact one


def test_torchrun_dry_run_of_a_bad_setting_exits_with_its_code() -> None:
    done = call("torchrun.sh", "--python", sys.executable, "--nproc-per-node", "2", "--dry-run", "optim.lrr=1")
    assert done.returncode == 3 and "optim.lr?" in done.stderr


def test_torchrun_starts_processes_that_know_their_rank(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['RANK']).write_text(os.environ['WORLD_SIZE'] + os.environ['PYTHONSAFEPATH'])\n"
    )
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"PYTHONPATH": str(tmp_path)}
    command = [
        "bash",
        str(ROOT / "launchers/torchrun.sh"),
        "--nproc-per-node",
        "2",
        "--python",
        sys.executable,
        "--module",
        "who",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["21", "21"]


INSTEAD = "which all four programs follow; try --out=runs/a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=3"], "--steps=3 is not a flag; see --help"),
        (["--out=", "a=1"], "--out needs a value; see --help"),
        (["--venv"], "--venv needs a value; see --help"),
        (["--dry_run=1"], "--dry-run takes no value; leave out =1"),
        (["output_dir=runs/a"], f"use --out instead of output_dir=runs/a, {INSTEAD}"),
        (
            ["--dry-run", "training.steps=3", "++output_dir=runs/a"],
            f"use --out instead of ++output_dir=runs/a, {INSTEAD}",
        ),
        (
            ["data.path=d"],
            "use --out instead of data.path=d: its folder data/ has the text; try --out=DIR, or launchers/torchrun.sh for other data",
        ),
        (
            ["--venv=/nope"],
            "--venv=/nope has no bin/python; run make quickstart, which builds .venv, or --venv=DIR of an environment with this project",
        ),
    ],
)
def test_quickstart_messages(arguments: list[str], message: str) -> None:
    done = call("quickstart.sh", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"quickstart: {message}\n")


def test_quickstart_accepts_flag_equals_value() -> None:
    done = call("quickstart.sh", "--venv=/nope", "--out=a=b_c", "--dry_run", "name=x_y")
    assert commands(done.stdout) == QUICKSTART.replace(".venv", "/nope").replace("outputs/quickstart", "a=b_c").replace(
        "data.path=a=b_c/data\n", "data.path=a=b_c/data name=x_y\n"
    )
    assert done.stderr.startswith("quickstart: the settings are not checked: --venv=/nope has no bin/python; ")


def test_quickstart_dry_run_checks_the_settings(tmp_path: Path) -> None:
    flags = ["--venv", sys.prefix, "--out", str(tmp_path / "out"), "--dry-run"]
    done = call("quickstart.sh", *flags, "training.stepz=5", PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")
    assert (done.returncode, done.stdout) == (3, "") and "did you mean training.steps?" in done.stderr
    assert not (tmp_path / "out").exists()


def bare_python(folder: Path) -> Path:
    """Returns a Python interpreter without third-party packages."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    stub.chmod(0o755)
    return stub


REMEDY = "try --python=.venv/bin/python, which make quickstart builds"


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_unsuitable_interpreter_is_explained(tmp_path: Path, script: str, dry_run: list[str]) -> None:
    bare = bare_python(tmp_path)
    for python, message in (
        ("/nope", f"--python=/nope does not exist or cannot be executed; {REMEDY}"),
        (str(bare), f"--python={bare} has no package ssa_pretrain; {REMEDY}, or pip install -e . into that one"),
    ):
        done = call(script, *dry_run, f"--python={python}", "a=1")
        assert (done.returncode, done.stdout, done.stderr) == (3, "", f"{script}: {message}\n")


def test_quickstart_explains_an_environment_without_the_project(tmp_path: Path) -> None:
    done = call("quickstart.sh", f"--venv={tmp_path}", PYTHONPATH=str(bare_python(tmp_path).parent))
    remedy = f"run make quickstart, which builds .venv, or {tmp_path}/bin/python -m pip install -e ."
    assert done.stderr == f"quickstart: --venv={tmp_path} has no package ssa_pretrain; {remedy}\n"
    assert (done.returncode, done.stdout) == (3, "")


def test_deepspeed_dry_run_ends_with_the_plan_and_deepspeeds_configuration() -> None:
    arguments = ["--num-gpus", "8", "--python", sys.executable, "--dry-run", "experiment=ssa_1b_8k"]
    done = call(
        "deepspeed.sh", *arguments, "deepspeed.zero_stage=2", "deepspeed.extra.zero_optimization.sub_group_size=7"
    )
    assert done.returncode == 0, done.stderr
    assert "8 processes = tp 1 x pp 1 x cp 1 x dp 8" in done.stdout
    settings = json.loads(done.stdout.split("DeepSpeed's configuration:\n")[1])
    assert settings["zero_optimization"]["stage"] == 2 and settings["zero_optimization"]["sub_group_size"] == 7
    assert settings["train_batch_size"] == 384 == 8 * settings["gradient_accumulation_steps"] * 2


@pytest.mark.parametrize("script", ["quickstart.sh", "torchrun.sh", "deepspeed.sh", "stages.sh"])
def test_help_is_the_comment_of_the_script(script: str) -> None:
    done = call(script, "--help")
    assert (
        done.returncode == 0 and "--dry-run" in done.stdout and "#!" not in done.stdout and "set -e" not in done.stdout
    )


@pytest.mark.parametrize("target", ["clean", "quickstart"])
@pytest.mark.parametrize("name", ["OUT", "VENV"])
@pytest.mark.parametrize("folder", ["/tmp/my dir", ""])
def test_make_refuses_folder_names_with_spaces(target: str, name: str, folder: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, f"{name}={folder}"],
        cwd=ROOT,
        env=environment_without_make(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"{name}={folder} must be one folder without spaces in its name; try {name}=" in done.stderr


def test_make_clean_removes_the_given_folders() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "clean", "OUT=/tmp/o", "VENV=/tmp/v"],
        cwd=ROOT,
        env=environment_without_make(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("rm -rf /tmp/v /tmp/o .pytest_cache ")


def test_shell_files_pass_shellcheck() -> None:
    files = [*ROOT.glob("launchers/*.*sh"), *ROOT.glob("launchers/*.sbatch"), ROOT / ".ci" / "run"]
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "--external-sources", "--shell=bash", *files], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
