"""launchers/*.sh: the commands that they would start, word for word, and what they say of wrong flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def outside_make() -> dict[str, str]:
    """Returns this process's variables without those by which make knows that it runs inside make: `make test` started the tests."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "OUT", "VENV")
    }


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
    headings = [line for line in done.stderr.splitlines() if line.startswith("[")]
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
    (tmp_path / "bin" / "python").write_text(
        '#!/bin/sh\n[ "$1" = -c ] || [ "$2" = ssa_pretrain.plan ] && exit 0\necho "$2"\nexit 4\n'
    )
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
            ["--nproc_per_node", "8", "--nnodes=2", "--rdzv-endpoint=h:1", "--rdzv_id=a=b_c", "a_b=c"],
            {},
            "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=h:1 --rdzv-id=a=b_c -m ssa_pretrain.train a_b=c",
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
    """An interpreter with every package that counts `count` devices, says what it is asked to run and with how many processes, and runs nothing."""
    stub = folder / "python"
    counts = f"echo {count}" if count else "exit 1"
    asked = f'[ "$1" = -c ] && case $2 in *find_spec*) exit 0 ;; *) {counts}; exit ;; esac\n'
    stub.write_text(f'#!/bin/sh\n{asked}echo "WORLD_SIZE=$WORLD_SIZE $*"\n')
    stub.chmod(0o755)
    return stub


UNCOUNTED = "the plan is for 1 process, since the GPUs of {} cannot be counted here"


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
    assert done.stderr == (
        "" if count else f"torchrun.sh: {UNCOUNTED.format('a node')}; --nproc-per-node=N gives their number\n"
    )
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
        (["--nodes=2"], "torchrun.sh: --nodes=2 is no flag of this; put flags of the entry point after --"),
        (["--nnodes"], "torchrun.sh: --nnodes needs a value; see --help"),
        (["--nproc_per_node=", "a=1"], "torchrun.sh: --nproc-per-node needs a value; see --help"),
        (["--nnodes", "", "a=1"], "torchrun.sh: --nnodes needs a value; see --help"),
        (["--dry-run=yes"], "torchrun.sh: --dry-run takes no value; leave out =yes"),
    ],
)
def test_torchrun_messages(arguments: list[str], message: str) -> None:
    done = call("torchrun.sh", "--python", "true", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", message + "\n")


OUT_ALONE = "is said with --out, which all four programs follow; try --out=runs/a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=3"], "--steps=3 is no flag of this; see --help"),
        (["--out=", "a=1"], "--out needs a value; see --help"),
        (["--venv"], "--venv needs a value; see --help"),
        (["--dry_run=1"], "--dry-run takes no value; leave out =1"),
        (["output_dir=runs/a"], f"output_dir=runs/a {OUT_ALONE}"),
        (["--dry-run", "training.steps=3", "++output_dir=runs/a"], f"++output_dir=runs/a {OUT_ALONE}"),
        (
            ["data.path=d"],
            "data.path=d is said with --out, whose folder data/ has the text; try --out=DIR, or launchers/torchrun.sh for other data",
        ),
        (
            ["--venv=/nope"],
            "--venv=/nope has no bin/python; say make quickstart, which makes .venv, or --venv=DIR of an environment with this project",
        ),
    ],
)
def test_quickstart_messages(arguments: list[str], message: str) -> None:
    done = call("quickstart.sh", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"quickstart: {message}\n")


def test_quickstart_takes_a_flag_and_its_value_as_one_word() -> None:
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
    """A Python without any package beside its own."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    stub.chmod(0o755)
    return stub


REMEDY = "try --python=.venv/bin/python, which make quickstart makes"


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_an_interpreter_that_will_not_do_is_explained(tmp_path: Path, script: str, dry_run: list[str]) -> None:
    bare = bare_python(tmp_path)
    for python, message in (
        ("/nope", f"--python=/nope is not there or cannot be run; {REMEDY}"),
        (str(bare), f"--python={bare} has no package ssa_pretrain; {REMEDY}, or pip install -e . into that one"),
    ):
        done = call(script, *dry_run, f"--python={python}", "a=1")
        assert (done.returncode, done.stdout, done.stderr) == (3, "", f"{script}: {message}\n")


def test_quickstart_explains_an_environment_without_the_project(tmp_path: Path) -> None:
    done = call("quickstart.sh", f"--venv={tmp_path}", PYTHONPATH=str(bare_python(tmp_path).parent))
    remedy = f"say make quickstart, which makes .venv, or {tmp_path}/bin/python -m pip install -e ."
    assert done.stderr == f"quickstart: --venv={tmp_path} has no package ssa_pretrain; {remedy}\n"
    assert (done.returncode, done.stdout) == (3, "")


HOSTS = "# three nodes\nn1 slots=8\n\n n2\tslots=4 max_slots=4\r\nn3 slots=2"  # no newline at the end
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
            ["--hostfile", "HOSTS", "--num-nodes", "2", "name=a b"],
            {"NUM_GPUS": "4", "MASTER_PORT": "29600"},
            "--hostfile=HOSTS --num_nodes=2 --num_gpus=4 --master_port=29600 --module ssa_pretrain.train engine=deepspeed "
            r"name=a\ b",
        ),
        (
            ["--include", "node1:0,2@node2", "--module", "m.n", "--", "--cfg", "job"],
            {},
            "--hostfile=/nonexistent --include=node1:0\\,2@node2 --master_port=29500 --module m.n engine=deepspeed --cfg job",
        ),
    ],
)
def test_deepspeed_prints_its_command(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], command: str
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(HOSTS)
    arguments = [str(hostfile) if word == "HOSTS" else word for word in arguments]
    done = call("deepspeed.sh", "--python", "true", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == DEEPSPEED + command.replace("HOSTS", str(hostfile)) + "\n"


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ([], 14),
        (["--num-nodes", "2"], 12),
        (["--num-gpus", "3"], 9),
        (["--num_gpus=3", "--num_nodes=2"], 6),
        (["--include", "n1:0,2@n3"], 4),
        (["--include=n1:0@n1:0,1"], 2),
        (["--include", "n2:1,9"], 1),  # DeepSpeed itself refuses GPU 9
        (["--exclude", "n1"], 6),
        (["--exclude=n1:0,7@n2:3"], 11),
    ],
)
def test_deepspeed_counts_the_hostfiles_slots_to_plan_and_to_check(
    tmp_path: Path, flags: list[str], processes: int
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(HOSTS)
    flags = ["--python", str(counting_python(tmp_path, "")), "--hostfile", str(hostfile), *flags, "a=1"]
    done = call("deepspeed.sh", "--dry-run", *flags)
    plan = f"WORLD_SIZE= -m ssa_pretrain.train engine=deepspeed a=1 parallel.world_size={processes} dry_run=true"
    assert (done.stdout.splitlines()[1:], done.stderr) == ([plan], "")
    done = call("deepspeed.sh", *flags)
    check, command = done.stdout.splitlines()
    assert check == f"WORLD_SIZE={processes} -m ssa_pretrain.plan --check engine=deepspeed a=1"
    assert command.startswith("WORLD_SIZE= -m deepspeed.launcher.runner --hostfile=")


@pytest.mark.parametrize(
    ("flags", "count", "processes", "flag"),
    [
        ([], "4", "4", ""),
        (["--include", "localhost:0,2"], "4", "2", ""),
        ([], "", "", "--num-gpus=N"),
        ([], "0", "", "--num-gpus=N"),
        (["--exclude", "localhost:0"], "", "", "--hostfile=PATH"),
    ],
)
def test_deepspeed_counts_the_gpus_of_one_node(
    tmp_path: Path, flags: list[str], count: str, processes: str, flag: str
) -> None:
    flags = ["--python", str(counting_python(tmp_path, count)), *flags]
    done = call("deepspeed.sh", "--dry-run", *flags, "a=1")
    planned = f" parallel.world_size={processes}" if processes else ""
    assert done.stdout.splitlines()[1:] == [
        f"WORLD_SIZE= -m ssa_pretrain.train engine=deepspeed a=1{planned} dry_run=true"
    ]
    said = f"deepspeed.sh: {UNCOUNTED.format('this node')}; {flag} gives their number\n"
    assert done.stderr == (said if flag else "")
    checked = [line for line in call("deepspeed.sh", *flags, "a=1").stdout.splitlines() if "--check" in line]
    assert checked == [f"WORLD_SIZE={processes} -m ssa_pretrain.plan --check engine=deepspeed a=1"] * bool(processes)


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_plan_that_is_told_its_processes_says_nothing_of_a_count(tmp_path: Path, script: str) -> None:
    done = call(script, "--python", str(counting_python(tmp_path, "")), "--dry-run", "parallel.world_size=8")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("n1 slots=8\nn2\n", [], "has a line 'n2', which must be HOST slots=GPUS; try 'n2 slots=8'"),
        ("n1 slots=0", [], "has a line 'n1 slots=0', which must be HOST slots=GPUS; try 'n1 slots=8'"),
        ("n1 slots=8x", [], "has a line 'n1 slots=8x', which must be HOST slots=GPUS; try 'n1 slots=8'"),
        ("n1 slots=8\nn1 slots=4\n", [], "has n1 twice; leave one line of it, with all its slots"),
        ("# nobody\n\n", [], "names no host; write a line such as 'node0 slots=8' for each node"),
        ("n1 slots=8\n", ["--num-nodes", "2"], "--num-nodes=2 is more than the hosts of PATH; try 1"),
        ("n1 slots=2\n", ["--exclude", "n1"], "--exclude=n1 leaves no GPU of n1; write HOST:GPU,GPU@HOST"),
    ],
)
def test_deepspeed_refuses_a_hostfile(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    done = call("deepspeed.sh", "--python", "true", "--hostfile", str(hostfile), *flags)
    given = f"--hostfile={hostfile}"
    said = message.replace("PATH", given) if message.startswith("--") else f"{given} {message}"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"deepspeed.sh: {said}\n")


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
        (["--master-port", "x"], "deepspeed.sh: --master-port=x must be a port, 1 to 65535; try 29500"),
        (
            ["--master_port=65536"],
            "deepspeed.sh: --master-port=65536 must be a port, 1 to 65535; try 29500",
        ),
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
        (
            ["--include=a:0", "--exclude=b"],
            "deepspeed.sh: --include and --exclude cannot both be given; name with --include what is left",
        ),
        (["--gpus", "2"], "deepspeed.sh: --gpus is no flag of this; put flags of the entry point after --"),
        (["--num_gpus="], "deepspeed.sh: --num-gpus needs a value; see --help"),
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


@pytest.mark.parametrize("target", ["clean", "quickstart"])
@pytest.mark.parametrize("name", ["OUT", "VENV"])
@pytest.mark.parametrize("folder", ["/tmp/my dir", ""])
def test_make_takes_no_folder_that_is_several_words(target: str, name: str, folder: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, f"{name}={folder}"],
        cwd=ROOT,
        env=outside_make(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"{name}={folder} must be one folder without spaces in its name; try {name}=" in done.stderr


def test_make_clean_removes_the_folders_it_is_given() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "clean", "OUT=/tmp/o", "VENV=/tmp/v"],
        cwd=ROOT,
        env=outside_make(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("rm -rf /tmp/v /tmp/o .pytest_cache ")


def test_shell_files_are_clean() -> None:
    files = [*ROOT.glob("launchers/*.sh"), ROOT / ".ci" / "run"]
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
