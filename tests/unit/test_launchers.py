"""launchers/*.sh: the commands that they would start, word for word, and what they say of wrong flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher from the repository's root with the variables given and those of this process that torchrun does not read."""
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
    """A dry run's commands without the space that ends each."""
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def test_quickstart_prints_its_four_commands() -> None:
    done = call("quickstart.sh", "--dry-run")
    assert done.returncode == 0 and commands(done.stdout) == QUICKSTART
    headings = [line for line in done.stderr.splitlines() if line]
    assert [heading[:5] for heading in headings] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_quickstart_passes_settings_and_folders_on() -> None:
    done = call("quickstart.sh", "--venv", "/v e", "--out", "o", "--dry-run", "training.steps=3", "name=a b")
    lines = commands(done.stdout).splitlines()
    assert lines[0] == r"/v\ e/bin/python -m data_prep source=quickstart tokenizer=bpe4k out=o/data"
    for line in lines[1:3]:
        assert line.endswith(r"experiment=quickstart output_dir=o data.path=o/data training.steps=3 name=a\ b")
    assert lines[3].endswith("-m ssa_pretrain.report o")


def test_quickstart_says_a_bad_setting_before_it_starts_anything(tmp_path: Path) -> None:
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


def test_torchrun_says_a_bad_setting_once_and_without_a_trace() -> None:
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


def test_quickstart_stops_where_a_step_fails(tmp_path: Path) -> None:
    """The interpreter stands for any program that fails: nothing after it is started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\n[ "$2" = ssa_pretrain.plan ] && exit 0\necho "$2"\nexit 4\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    done = call("quickstart.sh", "--venv", str(tmp_path))
    assert (done.returncode, done.stdout) == (4, "data_prep\n")


TORCHRUN = "PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 true -m torch.distributed.run "


@pytest.mark.parametrize(
    ("arguments", "environment", "command"),
    [
        (["a=1"], {}, "--nnodes=1 --nproc-per-node=auto --standalone -m ssa_pretrain.train a=1"),
        (
            ["--nproc-per-node", "8", "--module", "m.n", "--", "--cfg", "job"],
            {},
            "--nnodes=1 --nproc-per-node=8 --standalone -m m.n --cfg job",
        ),
        (
            ["--nnodes", "4", "--rdzv-endpoint", "node0:29400", "experiment=ssa_1b_8k", "name=a b"],
            {"NPROC_PER_NODE": "8"},
            "--nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29400 --rdzv-id=ssa_pretrain "
            r"-m ssa_pretrain.train experiment=ssa_1b_8k name=a\ b",
        ),
        (
            ["--rdzv-id", "mine"],
            {"NNODES": "2", "RDZV_ENDPOINT": "h:1", "RDZV_ID": "theirs"},
            "--nnodes=2 --nproc-per-node=auto --rdzv-backend=c10d --rdzv-endpoint=h:1 --rdzv-id=mine -m ssa_pretrain.train",
        ),
    ],
)
def test_torchrun_prints_its_command(arguments: list[str], environment: dict[str, str], command: str) -> None:
    done = call("torchrun.sh", "--python", "true", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == TORCHRUN + command + "\n"


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


def counting_python(folder: Path, count: str) -> Path:
    """An interpreter that counts `count` devices, says what it is asked to run and with how many processes, and runs nothing."""
    stub = folder / "python"
    counts = f"echo {count}" if count else "exit 1"
    stub.write_text(f'#!/bin/sh\n[ "$1" = -c ] && {{ {counts}; exit; }}\necho "WORLD_SIZE=$WORLD_SIZE $*"\n')
    stub.chmod(0o755)
    return stub


@pytest.mark.parametrize(
    ("count", "planned", "checked"),
    [("3", " parallel.world_size=6", ["WORLD_SIZE=6 -m ssa_pretrain.plan --check a=1"]), ("", "", [])],
)
@pytest.mark.parametrize("nproc", ["auto", "gpu"])
def test_torchrun_counts_devices_to_plan_and_to_check(
    tmp_path: Path, nproc: str, count: str, planned: str, checked: list[str]
) -> None:
    """Two nodes; where nothing can be counted the plan is left to the entry point and torchrun speaks for itself."""
    flags = ["--python", str(counting_python(tmp_path, count)), "--nproc-per-node", nproc]
    flags += ["--nnodes", "2", "--rdzv-endpoint", "h:1"]
    done = call("torchrun.sh", *flags, "--dry-run", "a=1")
    assert done.stdout.splitlines()[1:] == [f"WORLD_SIZE= -m ssa_pretrain.train a=1{planned} dry_run=true"]
    done = call("torchrun.sh", *flags, "a=1")
    *before, command = done.stdout.splitlines()
    assert before == checked and command.startswith("WORLD_SIZE= -m torch.distributed.run --nnodes=2")


def test_torchrun_dry_run_of_a_bad_setting_leaves_with_its_code() -> None:
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nnodes", "0"], "torchrun.sh: --nnodes=0 must be a positive number; try 1"),
        (
            ["--nproc-per-node", "many"],
            "torchrun.sh: --nproc-per-node=many must be a positive number, gpu or auto; try 8",
        ),
        (
            ["--nnodes", "2"],
            "torchrun.sh: --nnodes=2 needs --rdzv-endpoint=HOST:PORT, the same on every node; try the first node's name and port 29400",
        ),
        (["--nodes", "2"], "torchrun.sh: --nodes is no flag of this; put flags of the entry point after --"),
        (["--nnodes"], "torchrun.sh: --nnodes needs a value; see --help"),
    ],
)
def test_torchrun_messages(arguments: list[str], message: str) -> None:
    done = call("torchrun.sh", "--python", "true", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", message + "\n")


def test_quickstart_message() -> None:
    done = call("quickstart.sh", "--steps=3")
    assert (done.returncode, done.stderr) == (3, "quickstart: --steps=3 is no flag of this; see --help\n")


DEEPSPEED = "PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 true -m deepspeed.launcher.runner "


@pytest.mark.parametrize(
    ("arguments", "environment", "command"),
    [
        (
            ["--num-gpus", "8", "a=1"],
            {},
            "--hostfile=/nonexistent --num_gpus=8 --master_port=29500 --module ssa_pretrain.train engine=deepspeed a=1",
        ),
        (
            ["--hostfile", "LICENSE", "--num-nodes", "2", "name=a b"],
            {"NUM_GPUS": "4", "MASTER_PORT": "29600"},
            "--hostfile=LICENSE --num_nodes=2 --num_gpus=4 --master_port=29600 --module ssa_pretrain.train engine=deepspeed "
            r"name=a\ b",
        ),
        (
            ["--include", "node1:0,2@node2", "--module", "m.n", "--", "--cfg", "job"],
            {},
            "--hostfile=/nonexistent --include=node1:0\\,2@node2 --master_port=29500 --module m.n engine=deepspeed --cfg job",
        ),
    ],
)
def test_deepspeed_prints_its_command(arguments: list[str], environment: dict[str, str], command: str) -> None:
    done = call("deepspeed.sh", "--python", "true", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == DEEPSPEED + command + "\n"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "0"], "deepspeed.sh: --num-gpus=0 must be a positive number; try 8"),
        (["--num-nodes", "x"], "deepspeed.sh: --num-nodes=x must be a positive number; try 2"),
        (["--master-port", "x"], "deepspeed.sh: --master-port=x must be a port; try 29500"),
        (
            ["--hostfile", "nowhere"],
            "deepspeed.sh: --hostfile=nowhere is not there; it has a line such as 'node0 slots=8' for each node",
        ),
        (
            ["--num-nodes", "2"],
            "deepspeed.sh: --num-nodes=2 needs --hostfile, with a line such as 'node0 slots=8' for each node",
        ),
        (
            ["--include", "a:0", "--num-gpus", "2"],
            "deepspeed.sh: --include and --exclude name the GPUs; leave out --num-gpus and --num-nodes",
        ),
        (["--num_gpus", "2"], "deepspeed.sh: --num_gpus is no flag of this; put flags of the entry point after --"),
        (["--hostfile"], "deepspeed.sh: --hostfile needs a value; see --help"),
    ],
)
def test_deepspeed_messages(arguments: list[str], message: str) -> None:
    done = call("deepspeed.sh", "--python", "true", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", message + "\n")


@pytest.mark.parametrize("script", ["quickstart.sh", "torchrun.sh", "deepspeed.sh"])
def test_help_is_the_files_own_comment(script: str) -> None:
    done = call(script, "--help")
    assert (
        done.returncode == 0 and "--dry-run" in done.stdout and "#!" not in done.stdout and "set -e" not in done.stdout
    )


def test_shell_files_are_clean() -> None:
    files = [*ROOT.glob("launchers/*.sh"), ROOT / ".ci" / "run"]
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
