"""The exact commands that launchers start, and their messages for bad flags, hostfiles and ports."""

import json
import socket
import sys
from pathlib import Path

import pytest

from ssa_pretrain.errors import LaunchError
from ssa_pretrain.launch import __main__ as launch
from ssa_pretrain.launch import jobs

MODULE = "json.tool"  # an entry point that is there and is not ours


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with four GPUs, as torch and DeepSpeed count them."""
    monkeypatch.setattr(jobs, "count_torch", lambda nproc: 4)
    monkeypatch.setattr(jobs, "count_deepspeed", lambda: 4)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node on which nothing can be counted."""
    monkeypatch.setattr(jobs, "count_torch", lambda nproc: None)
    monkeypatch.setattr(jobs, "count_deepspeed", lambda: None)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("words", "environment", "command", "world_size"),
    [
        ("a=1", {}, "--nnodes=1 --nproc-per-node=auto --standalone -m ssa_pretrain.train a=1", 4),
        (f"--nproc-per-node 8 --module {MODULE} -- --cfg job", {}, f"--nnodes=1 --nproc-per-node=8 --standalone -m {MODULE} --cfg job", 8),
        (
            "--nnodes 4 --rdzv-endpoint node0:29400 experiment=ssa_1b_8k --x",
            {"NPROC_PER_NODE": "8"},
            "--nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29400 --rdzv-id=ssa_pretrain "
            "-m ssa_pretrain.train experiment=ssa_1b_8k --x",
            32,
        ),
        (
            "--nproc_per_node gpu --nnodes=2 --rdzv-endpoint=h:1 --rdzv_id=a=b_c a_b=c",
            {},
            "--nnodes=2 --nproc-per-node=gpu --rdzv-backend=c10d --rdzv-endpoint=h:1 --rdzv-id=a=b_c -m ssa_pretrain.train a_b=c",
            8,
        ),
        (
            "--rdzv-id mine --python ignored",
            {"NNODES": "2", "RDZV_ENDPOINT": "h:1", "RDZV_ID": "theirs"},
            "--nnodes=2 --nproc-per-node=auto --rdzv-backend=c10d --rdzv-endpoint=h:1 --rdzv-id=mine -m ssa_pretrain.train",
            8,
        ),
    ],
)  # fmt: skip
def test_torchrun_command(words: str, environment: dict[str, str], command: str, world_size: int) -> None:
    job, is_shown = jobs.torchrun_job(words.split(), environment)
    assert (job.command, is_shown) == ([sys.executable, "-m", "torch.distributed.run", *command.split()], False)
    assert job.executed == [sys.executable, "-m", "ssa_pretrain.launch.torch_agent", *command.split()]
    assert job.world_size == world_size


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("words", "environment", "restarts"),
    [
        ("", {}, (3, 5)),
        ("--max-restarts 0 --restart_wait=60", {"MAX_RESTARTS": "7"}, (0, 60)),
        ("", {"MAX_RESTARTS": "7", "RESTART_WAIT": "0"}, (7, 0)),
        (f"--module {MODULE}", {}, (0, 5)),  # only training resumes
        (f"--module {MODULE} --max-restarts 2", {}, (2, 5)),
    ],
)
def test_restarts_of_both_launchers(words: str, environment: dict[str, str], restarts: tuple[int, int]) -> None:
    for build, more in ((jobs.torchrun_job, ""), (jobs.deepspeed_job, " --master-port=15997")):
        job, _ = build((words + more).split(), environment)
        assert (job.max_restarts, job.restart_wait) == restarts


HOSTS = "# three nodes\nn1 slots=8\n\n n2\tslots=4 max_slots=4\r\nn3 slots=2"  # no newline at the end


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("words", "environment", "command"),
    [
        ("--num-gpus 8 --master-port=15999 a=1", {}, "--hostfile=/nonexistent --num_gpus=8 --master_port=15999 --module ssa_pretrain.train engine=deepspeed a=1"),
        (
            "--hostfile HOSTS --num-nodes 2 name=ab",
            {"NUM_GPUS": "4", "MASTER_PORT": "29600"},
            "--hostfile=HOSTS --num_nodes=2 --num_gpus=4 --master_port=29600 --module ssa_pretrain.train engine=deepspeed name=ab",
        ),
        ("--hostfile HOSTS", {}, "--hostfile=HOSTS --master_port=29500 --module ssa_pretrain.train engine=deepspeed"),
        (
            f"--include localhost:0,2 --module {MODULE} --dry-run -- --cfg job",
            {"MASTER_PORT": "15998"},
            f"--hostfile=/nonexistent --include=localhost:0,2 --master_port=15998 --module {MODULE} engine=deepspeed --cfg job",
        ),
    ],
)  # fmt: skip
def test_deepspeed_command(tmp_path: Path, words: str, environment: dict[str, str], command: str) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    words, command = (text.replace("HOSTS", str(tmp_path / "hosts")) for text in (words, command))
    job, is_shown = jobs.deepspeed_job(words.split(), environment)
    assert job.command == [sys.executable, "-m", "deepspeed.launcher.runner", *command.split()]
    agent = [sys.executable, "-m", "ssa_pretrain.launch.deepspeed_agent", *command.split()]
    assert [word for word in job.executed if word != "--log_level=critical"] == agent
    assert is_shown == ("--dry-run" in words)


@pytest.mark.parametrize(
    ("flags", "processes", "is_remote"),
    [
        ("", 14, True),
        ("--num-nodes 2", 12, True),
        ("--num-nodes 1", 8, False),
        ("--num-gpus 3", 9, True),
        ("--num_gpus=3 --num_nodes=2", 6, True),
        ("--include n1:0,2@n3", 4, True),
        ("--include=n1:0@n1:0,1", 2, False),
        ("--include n2:1,9", 1, False),  # DeepSpeed itself refuses GPU 9
        ("--exclude n1", 6, True),
        ("--exclude=n1:0,7@n2:3", 11, True),
    ],
)
def test_deepspeed_counts_the_slots_of_a_hostfile(tmp_path: Path, flags: str, processes: int, is_remote: bool) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    job, _ = jobs.deepspeed_job(["--hostfile", str(tmp_path / "hosts"), *flags.split()], {})
    assert (job.world_size, job.is_remote) == (processes, is_remote)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("flags", "processes"), [("", 4), ("--include localhost:0,2", 2), ("--num-gpus 3", 3)])
def test_deepspeed_counts_the_gpus_of_one_node(flags: str, processes: int) -> None:
    assert jobs.deepspeed_job(flags.split(), {})[0].world_size == processes


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(
    ("launcher", "flags", "remedy"),
    [
        ("torchrun", "", "the GPUs of a node cannot be counted here; --nproc-per-node=N gives their number"),
        ("deepspeed", "", "the GPUs of this node cannot be counted here; --num-gpus=N gives their number"),
        (
            "deepspeed",
            "--exclude localhost:0",
            "the GPUs of this node cannot be counted here; --hostfile=PATH gives their number",
        ),
    ],
)
def test_plan_for_an_unknown_number_of_processes_is_marked(capfd, launcher: str, flags: str, remedy: str) -> None:
    words = [launcher, *flags.split(), "--dry-run", "--module", "ssa_pretrain.plan", "model.vocab_size=512"]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    assert launch.main([*words, "experiment=quickstart"], environment) == 0
    out, err = capfd.readouterr()
    assert err == f"{launcher}.sh: the plan is for 1 process, since {remedy}\n"
    assert "1 process " in out and "\ncommand " not in out
    job, _ = (jobs.torchrun_job if launcher == "torchrun" else jobs.deepspeed_job)(flags.split(), {})
    assert job.world_size is None


NODE = "with a line such as 'node0 slots=8' for each node"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("torchrun --nnodes 0", "--nnodes=0 must be a positive number; try 1"),
        ("torchrun --max-restarts -1", "--max-restarts=-1 must be a whole number, at least 0; try 3"),
        ("deepspeed --restart-wait=soon", "--restart-wait=soon must be a whole number, at least 0; try 5"),
        ("torchrun --nproc-per-node many", "--nproc-per-node=many must be a positive number, gpu or auto; try 8"),
        (
            "torchrun --nnodes 2",
            "--nnodes=2 needs --rdzv-endpoint=HOST:PORT, the same on every node; try the first node's name and port 29400",
        ),
        ("torchrun --nodes 2", "--nodes is not a flag; put flags of the entry point after --"),
        ("torchrun --nodes=2", "--nodes=2 is not a flag; put flags of the entry point after --"),
        ("torchrun --nnodes", "--nnodes needs a value; see --help"),
        ("torchrun --nproc_per_node= a=1", "--nproc-per-node needs a value; see --help"),
        ("torchrun --dry-run=yes", "--dry-run takes no value; leave out =yes"),
        ("torchrun --module nowhere.train", f"--python={sys.executable} has no package nowhere, which --module=nowhere.train names"),
        ("deepspeed --num-gpus 0", "--num-gpus=0 must be a positive number; try 8"),
        ("deepspeed --num-nodes x", "--num-nodes=x must be a positive number; try 2"),
        ("deepspeed --master-port x", "--master-port=x must be a port, 1 to 65535; try 29500"),
        ("deepspeed --master_port=65536", "--master-port=65536 must be a port, 1 to 65535; try 29500"),
        ("deepspeed --hostfile nowhere", "--hostfile=nowhere does not exist; it has a line such as 'node0 slots=8' for each node"),
        ("deepspeed --num-nodes 2", f"--num-nodes=2 needs --hostfile, {NODE}"),
        ("deepspeed --include a:0 --num-gpus 2", "--include and --exclude name the GPUs; leave out --num-gpus and --num-nodes"),
        ("deepspeed --include=a:0 --exclude=b", "--include and --exclude cannot both be given; name with --include what is left"),
        ("deepspeed --gpus 2", "--gpus is not a flag; put flags of the entry point after --"),
        ("deepspeed --hostfile", "--hostfile needs a value; see --help"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(capfd, command: str, message: str) -> None:
    launcher, *words = command.split()
    assert launch.main([launcher, *words], {}) == 3
    assert capfd.readouterr() == ("", f"{launcher}.sh: {message}\n")


def test_empty_value_counts_as_unset(capfd) -> None:
    assert launch.main(["torchrun", "--nnodes", "", "a=1"], {}) == 3
    assert capfd.readouterr().err == "torchrun.sh: --nnodes needs a value; see --help\n"


def test_stop_time_that_is_not_a_number_is_refused(capfd) -> None:
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1m"}
    assert launch.main(["torchrun", "--nproc-per-node=1", "--module", MODULE], environment) == 3
    rule = "in the environment must be a whole number of seconds; try 600"
    assert capfd.readouterr().err == f"torchrun.sh: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1m {rule}\n"


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
def test_bad_hostfile_is_refused(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    given = f"--hostfile={tmp_path / 'hosts'}"
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LaunchError) as caught:
        jobs.deepspeed_job([given, *flags], {})
    assert str(caught.value) == (message.replace("PATH", given) if message.startswith("--") else f"{given} {message}")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_given_port_in_use_is_refused_and_default_port_in_use_is_avoided(address: str) -> None:
    with socket.create_server((address, 0)) as taken:
        port = taken.getsockname()[1]
        in_use = "is in use by another process of this node"
        for words, environment, message in (
            (["--master-port", str(port)], {}, f"--master-port={port} {in_use}; leave it out for a free one"),
            (
                [],
                {"MASTER_PORT": str(port)},
                f"MASTER_PORT={port} in the environment {in_use}; unset it for a free port, or give --master-port",
            ),
        ):
            with pytest.raises(LaunchError) as caught:
                jobs.deepspeed_job(["--num-gpus=2", *words], environment)
            assert str(caught.value) == message
        with socket.create_server(("", jobs.DEFAULT_PORT)) if jobs.is_free(jobs.DEFAULT_PORT) else taken:
            job, _ = jobs.deepspeed_job(["--num-gpus=2"], {})
    (chosen,) = [word.removeprefix("--master_port=") for word in job.command if word.startswith("--master_port=")]
    assert 15_000 <= int(chosen) < 30_000 and int(chosen) != jobs.DEFAULT_PORT


def test_job_environment_drops_variables_of_an_outer_job() -> None:
    outer = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "SLURM_PROCID": "2", "OMP_NUM_THREADS": "4"}
    expected = {"SLURM_PROCID": "2", "OMP_NUM_THREADS": "4", "PYTHONSAFEPATH": "1"}
    assert launch.job_environment(outer) == expected, json.dumps(launch.job_environment(outer))
