"""SECURITY.md on real runs: secrets are in no byte that a run writes, checkpoints run no code, and the ranks' stores listen on the loopback only."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ssa_pretrain.checkpoint.integrity import record_text
from support.sockets import beyond_loopback, listeners
from support.training import ROOT, descendants, environment, launched, run, run_command

pytestmark = pytest.mark.timeout(900)
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "training.steps=2",
    "training.global_batch_tokens=1024",
    "training.micro_batch_size=2",
    "data.sequence_length=256",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "checkpoint.interval=1",
)
CANARIES = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "fedcba98",
    "HF_TOKEN": "hf_" + "CanaryOfTheHub" * 3,
    "AWS_ACCESS_KEY_ID": "AKIA" + "CANARY0CANARY0XY",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/bucket/0123456789abcdefGHI",
    "MY_PASSWORD": "canary-passphrase-of-the-user",
}


def require_no_canary(content: bytes, where: object) -> None:
    for name, canary in CANARIES.items():
        assert canary.encode() not in content, f"the value of {name} is in {where}"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run on two ranks with secrets in its environment, tracked by W&B's client, evaluated and reported. Its console is in `console`."""
    home = tmp_path_factory.mktemp("secrets")
    folder, console = home / "run", ""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CANARIES | {"HOME": str(home), "TMPDIR": str(home)}).items():
            patch.setenv(name, value)
        data = (f"data.path={corpus}", f"output_dir={folder}")
        for module, arguments, processes in (
            ("ssa_pretrain.train", (*SETTINGS, *data, "logging=wandb_offline", "profile.at=[2]"), 2),
            ("ssa_pretrain.evaluate", (str(folder), "evaluation.rows=1"), 1),
            ("ssa_pretrain.report", (str(folder),), 1),
        ):
            done = run(module, *arguments, processes=processes)
            console += done.stdout + done.stderr
            assert done.returncode == 0, console[-3000:]
    (folder / "console").write_text(console)
    return folder


def test_secrets_are_in_no_byte_of_a_run(trained):
    files = [path for path in trained.parent.rglob("*") if path.is_file()]
    assert {".wandb", ".json", ".jsonl", ".yaml", ".html", ".distcp", ".safetensors"} <= {path.suffix for path in files}
    for path in files:
        require_no_canary(path.read_bytes(), path)


IN_SETTINGS = (
    "+wandb.api_key={WANDB_API_KEY}",
    "logging.wandb.project={HF_TOKEN}",
    "logging.wandb.tags=[a,{WANDB_API_KEY}]",
    "name=run-{MY_PASSWORD}",
    "output_dir=s3://{AWS_ACCESS_KEY_ID}:{AWS_SECRET_ACCESS_KEY}@bucket/data",
    "data.path='https://user:hunter2hunter2@host/data'",
    "deepspeed.extra.a.b={HF_TOKEN}",
)


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        (IN_SETTINGS, [3]),
        ((*IN_SETTINGS, "dry_run=true"), [3]),
        ((*IN_SETTINGS[1:], "--cfg", "job", "--resolve"), [0]),
        (("nmae={HF_TOKEN}", "{HF_TOKEN}", "--token={HF_TOKEN}", "optim.lr={MY_PASSWORD}"), [3]),
    ],
)
def test_secret_on_the_command_line_is_refused_and_never_printed(arguments, codes, tmp_path, monkeypatch, capsys):
    from ssa_pretrain.cli import read_config

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        read_config("train", ["experiment=quickstart", *(word.format_map(CANARIES) for word in arguments)])
    printed = "".join(capsys.readouterr())
    assert [caught.value.code] == codes, printed
    require_no_canary(printed.encode(), printed)
    assert "hunter2hunter2" not in printed and "<hidden>" in printed
    if arguments == IN_SETTINGS:
        keys = (
            "wandb.api_key",
            "logging.wandb.project",
            "logging.wandb.tags",
            "name",
            "output_dir",
            "data.path",
            "deepspeed.extra.a.b",
        )
        for key in keys:
            assert f"  {key}=<hidden> is a secret, and the configuration is saved; set WANDB_API_KEY" in printed
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_launcher_prints_no_secret(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    given = [word.format_map(CANARIES) for word in IN_SETTINGS]
    done = run_command(launched("torchrun.sh", "--dry-run", "experiment=quickstart", *given))
    assert done.returncode == 3
    require_no_canary((done.stdout + done.stderr).encode(), done.stdout + done.stderr)
    assert "name=run-<hidden>" in done.stdout


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def attacked(trained: Path, folder: Path, *, listed: bool) -> tuple[Path, Path]:
    """Returns a copy of a run with one checkpoint whose `.metadata` is an attack, with or without its sha256 in the list, and the attack's marker."""
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000001")
    checkpoint, marker = folder / "checkpoints" / "step_00000002", folder.parent / "attacked"
    content = pickle.dumps(Attack(marker))
    (checkpoint / ".metadata").write_bytes(content)
    if listed:
        record = json.loads((checkpoint / "checkpoint.json").read_text())
        record["files"][".metadata"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "checkpoint.json").write_text(record_text(record))
    return checkpoint, marker


def test_damaged_metadata_is_found_before_it_is_read(trained, tmp_path):
    checkpoint, marker = attacked(trained, tmp_path / "run", listed=False)
    done = run("ssa_pretrain.evaluate", str(checkpoint))
    assert done.returncode == 5, done.stderr[-2000:]
    assert "is damaged (.metadata has" in done.stdout
    assert not marker.exists()


@pytest.mark.parametrize("path", ["resume", "init_from", "evaluate"])
def test_checkpoint_of_an_attacker_runs_no_code(trained, corpus, tmp_path, path):
    """The attacker wrote the list of files too, so every sha256 is right."""
    checkpoint, marker = attacked(trained, tmp_path / "run", listed=True)
    data = (*SETTINGS, f"data.path={corpus}")
    done = {
        "resume": lambda: run(
            "ssa_pretrain.train", *data, "training.steps=4", f"output_dir={checkpoint.parents[1]}", processes=2
        ),
        "init_from": lambda: run(
            "ssa_pretrain.train", *data, f"output_dir={tmp_path / 'new'}", f"checkpoint.init_from={checkpoint}"
        ),
        "evaluate": lambda: run("ssa_pretrain.evaluate", str(checkpoint)),
    }[path]()
    assert done.returncode == 5, done.stderr[-3000:]
    assert f"{checkpoint / '.metadata'} names posix.mkdir, which is in no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()


def test_launcher_and_ranks_of_one_node_listen_on_the_loopback_only(corpus, tmp_path):
    settings = (
        *SETTINGS,
        "training.steps=400",
        f"data.path={corpus}",
        f"output_dir={tmp_path}",
        "checkpoint.interval=400",
    )
    found: set[str] = set()
    with subprocess.Popen(
        launched("torchrun.sh", *settings),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 400
            while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
                assert time.monotonic() < deadline and process.poll() is None, "the run did not begin"
                found |= listeners([process.pid, *descendants(process.pid)])
                time.sleep(0.1)
        finally:
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):  # it has ended with its launcher
                    os.kill(pid, signal.SIGKILL)
    assert found, "no store was seen"
    assert beyond_loopback(found) == set()
