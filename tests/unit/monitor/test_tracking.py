"""ssa_pretrain/monitor/tracking.py with the real W&B client: offline files, absent, broken or silent servers, secrets."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssa_pretrain.cli import read_config
from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor import client_tracker, tracking, tracking_client
from ssa_pretrain.monitor.alerts import Alert, Level
from ssa_pretrain.monitor.redaction import HIDDEN, redact
from ssa_pretrain.monitor.tracking import WandbTracker, start_tracking
from ssa_pretrain.monitor.tracking_rows import STATE_FILE
from support.wandb_runs import (
    KEY,
    RESENT,
    evaluation_record,
    history,
    no_account,
    offline,
    segments,
    stored_records,
    train_record,
)

__all__ = ["no_account"]


def test_disabled_tracking_writes_nothing(tmp_path: Path) -> None:
    assert start_tracking(WandbConfig(), name="x", folder=tmp_path / "run", config={}, print_line=pytest.fail) is None
    assert not (tmp_path / "run").exists()


def test_offline_run_can_be_read_back(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = offline(tmp_path, {"optim": {"lr": 0.5}, "data_manifest_sha256": "abc"}, lines)
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    tracker.log(evaluation_record(3, "sparse") | {"captured_mass_by_layer": [0.5, 0.75]})
    tracker.alert(Alert("not finite", f"step 3, key {KEY}", Level.error, 3))
    tracker.finish()
    tracker.finish()
    tracker.alert(Alert("too late", "the tracker has ended"))

    (file,) = segments(tmp_path)
    kinds: dict[str, list] = {}
    for record in stored_records(file):
        kinds.setdefault(record.WhichOneof("record_type") or "", []).append(record)
    run = kinds["run"][0].run
    assert (run.run_id, run.display_name, run.project, run.run_group, list(run.tags)) == (
        tracker.id,
        "a-run",
        "p",
        "g",
        ["t"],
    )
    stored = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert stored["optim"] == {"lr": 0.5} and stored["data_manifest_sha256"] == "abc"
    assert {(m.metric.name or m.metric.glob_name, m.metric.step_metric) for m in kinds["metric"]} >= {
        ("train/*", "tokens"),
        ("heldout/*", "heldout_tokens"),
        ("task/*", "task_tokens"),
    }
    best = {m.metric.name: m.metric.summary for m in kinds["metric"]}
    assert best["heldout/sparse/cross_entropy"].min and best["train/mfu"].max and best["train/mfu"].last
    (alert,) = [record.alert for record in kinds["alert"]]
    assert (alert.title, alert.level) == ("not finite", "ERROR") and alert.text == f"step 3, key {HIDDEN}"
    (picture,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/heldout/sparse/captured_mass_map_3_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = history(tmp_path)
    assert [(row["tokens"], row["train/loss"]) for row in rows[:3]] == [(100, 1.0), (200, 0.5), (300, 1 / 3)]
    assert rows[0]["train/captured_mass/layer_01"] == 0.25 and "train/mfu" not in rows[0]
    assert rows[2]["heldout/sparse/captured_mass_map._type"] == "image-file"
    assert rows[2]["heldout/sparse/cross_entropy"] == 2.5 and rows[2]["_step"] == 3
    assert len(lines) == 1 and lines[0].startswith("W&B wrote offline; upload with: wandb sync ")
    assert Path(lines[0].rsplit(" ", 1)[1]) == file.parent


def test_steps_repeated_with_other_settings_start_another_wandb_run(tmp_path: Path) -> None:
    """As after a diverged loss: from the checkpoint of step 4 with a lower learning rate, in the same folder."""
    ids, lines = [], []
    for step, rate, last in ((0, 0.5, 6), (4, 0.5, 7), (4, 0.1, 8), (8, 0.05, 9)):
        settings = WandbConfig(mode=WandbMode.offline, project="p")
        tracker = start_tracking(
            settings,
            name="x",
            folder=tmp_path,
            config={},
            print_line=lines.append,
            step=step,
            decisive={"optim.lr": rate},
        )
        assert tracker is not None
        ids.append(tracker.id)
        for number in range(1, last + 1):  # a restart passes the records from the first on
            tracker.log(train_record(number))
        tracker.finish()
    assert ids[0] == ids[1] != ids[2], "the same settings continue the same run"
    assert ids[3] == ids[2], "and so do others if no step is trained again"
    assert [line for line in lines if "a new run" in line] == [
        "W&B: a new run, because the previous one has steps after 4 from other settings"
    ]


def test_training_continues_if_the_state_cannot_be_written(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / STATE_FILE).mkdir()
    tracker = offline(tmp_path, lines=lines)
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    tracker.finish()
    assert lines[0].startswith(f"{tmp_path / STATE_FILE} cannot be written (") and len(lines) == 2
    assert lines[0].endswith("; training and W&B continue") and [row["step"] for row in history(tmp_path)] == [1, 2, 3]


class Broken(BaseHTTPRequestHandler):
    """A server that answers 500 to every request."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Prints nothing."""


@pytest.fixture(params=["refused", "silent", "broken"])
def bad_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a local W&B server that refuses connections, never answers, or answers only with errors."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if request.param == "silent":
            listener.listen(50)
        elif request.param == "broken":
            server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            server.server_close()
            return
        yield address


def test_bad_server_delays_training_by_seconds_and_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_server: str
) -> None:
    in_time, send = tracking.CLIENT_SECONDS, tracking_client.ClientProcess.send

    def send_patiently(process: tracking_client.ClientProcess, message: Mapping[str, Any]) -> None:
        """Only the server may be slow, not the start of the service that then writes offline."""
        send(process, {**message, **({"patience": in_time} if message.get("mode") == "offline" else {})})

    monkeypatch.setattr(tracking_client.ClientProcess, "send", send_patiently)
    monkeypatch.setattr(tracking, "CLIENT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", bad_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lines: list[str] = []
    tracker = start_tracking(
        WandbConfig(mode=WandbMode.online), name="x", folder=tmp_path, config={}, print_line=lines.append
    )
    assert tracker is not None
    assert (
        len(lines) == 1 and lines[0].startswith("W&B online cannot start (") and lines[0].endswith("; writing offline")
    )
    # The client gave up by itself, after CLIENT_SECONDS. Neither its process's alarm nor training's own limit ended the wait.
    assert "its service does not answer" not in lines[0] and "not ready after" not in lines[0]
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    tracker.finish()
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3]
    assert "wandb sync" in lines[1]


def test_missing_key_means_offline_without_a_prompt(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = start_tracking(
        WandbConfig(mode=WandbMode.online), name="x", folder=tmp_path, config={}, print_line=lines.append
    )
    assert tracker is not None and len(lines) == 1 and lines[0].endswith("; writing offline")
    tracker.finish()


def service(tracker: WandbTracker) -> psutil.Process:
    assert tracker._process is not None
    (found,) = psutil.Process(tracker._process._child.pid).children()
    return found


def test_hanging_service_delays_only_the_end_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_tracker, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(tracking_client, "ALARM_SECONDS", 60.0)  # a busy machine is slow to run the handler
    pump, waits, lines = tracking_client.ClientProcess.pump, [], []
    monkeypatch.setattr(
        tracking_client.ClientProcess,
        "pump",
        lambda process, seconds=0.0: (waits.append(seconds), pump(process, seconds)),
    )
    tracker = offline(tmp_path, lines=lines)
    child, core = tracker._process._child, service(tracker)  # pyright: ignore[reportOptionalMemberAccess]
    core.suspend()
    waits.clear()
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    assert waits == [0.0] * 3, "no record waits for the service"
    tracker.finish()
    # Training's own limit ended the wait, not those of the client, which are longer.
    assert (
        len(lines) == 1 and lines[0].startswith("W&B did not finish (still running after 1 s); ") and RESENT in lines[0]
    )
    core.wait(60)
    assert child.poll() is not None, "nothing is left behind"
    monkeypatch.setattr(client_tracker, "FINISH_SECONDS", 60.0)
    tracker = offline(tmp_path, lines=lines)
    for step in (1, 2, 3, 4):
        tracker.log(train_record(step))
    tracker.finish()
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3, 4]


def test_hanging_process_ends_tracking_but_not_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_client, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(client_tracker, "MAX_WAITING", 2**16)
    lines: list[str] = []
    tracker = offline(tmp_path, lines=lines)
    child = tracker._process._child  # pyright: ignore[reportOptionalMemberAccess]
    child.send_signal(signal.SIGSTOP)
    for step in range(1, 2000):
        tracker.log(train_record(step))
    tracker.finish()
    assert lines == [
        f"W&B stopped taking records (its process has read nothing for 0.5 s); training and metrics.jsonl continue, and {RESENT}"
    ]
    assert child.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise KeyboardInterrupt", "killed by SIGINT"),
        ("raise TypeError('of its own')", "TypeError: of its own"),
        ("import sys; sys.exit('no such service')", "no such service"),
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "not ready after 2 s"),
    ],
)
def test_failing_client_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    """A package that fails in a given way replaces W&B's."""
    (tmp_path / "wandb.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    if "not ready" in reason:
        monkeypatch.setattr(tracking, "START_SECONDS", 2.0)
    lines: list[str] = []
    settings, folder = WandbConfig(mode=WandbMode.online), tmp_path / "run"
    assert start_tracking(settings, name="x", folder=folder, config={}, print_line=lines.append) is None
    assert [line.rsplit("; ", 1)[1] for line in lines] == ["writing offline", "continuing without W&B"]
    assert all(
        line.startswith(f"W&B {mode} cannot start (") for mode, line in zip(("online", "offline"), lines, strict=True)
    )
    assert all(reason in line for line in lines), lines


@pytest.mark.parametrize("failing", ["init", "log", "define_metric"])
def test_exception_of_the_client_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The real client, with one function patched to raise."""
    site = tmp_path / "site"
    site.mkdir()
    owner = "wandb" if failing == "init" else "wandb.Run"
    (site / "broken_client.py").write_text(
        f"import wandb\nfrom wandb.sdk.mailbox import HandleAbandonedError\n"
        f"def fail(*_, **__): raise HandleAbandonedError('left alone')\n{owner}.{failing} = fail\n"
    )
    monkeypatch.setattr(tracking_client, "PROGRAM", f"import broken_client; {tracking_client.PROGRAM}")
    monkeypatch.syspath_prepend(site)
    lines: list[str] = []
    folder, settings = tmp_path / "run", WandbConfig(mode=WandbMode.offline)
    tracker = start_tracking(settings, name="x", folder=folder, config={}, print_line=lines.append)
    if failing == "log":
        assert tracker is not None
        for step in itertools.count(1):
            tracker.log(train_record(step))
            if lines:
                break
            time.sleep(0.002)
        tracker.finish()
        assert lines == [f"W&B stopped taking records (left alone); training and metrics.jsonl continue, and {RESENT}"]
    else:
        assert tracker is None and lines == ["W&B offline cannot start (left alone); continuing without W&B"]


def test_service_of_another_program_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere")
    tracker = offline(tmp_path)
    tracker.finish()
    assert len(segments(tmp_path)) == 1


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tracker = offline(tmp_path / "run")
        tracker.log(train_record(1))
        tracker.finish()
    finally:
        os.umask(before)
    ours = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in ours}
    assert {modes[name] for name in (STATE_FILE, "process.log", f"run-{tracker.id}.wandb")} == {"0o640"}
    assert set(modes.values()) <= {"0o640", "0o750"}, modes


def test_without_the_package_a_run_with_logging_off_imports_everything() -> None:
    """Imports every entry point; none of them imports W&B."""
    code = """
import sys
sys.modules["wandb"] = None
import data_prep.cli, data_prep.pipeline, ssa_pretrain.bench.cases, ssa_pretrain.evaluate, ssa_pretrain.plan, ssa_pretrain.report.page
import ssa_pretrain.train, ssa_pretrain.trainer, ssa_pretrain.engine.megatron.engine, ssa_pretrain.monitor.tracking
from pathlib import Path
from ssa_pretrain.config import WandbConfig
assert ssa_pretrain.monitor.tracking.start_tracking(WandbConfig(), name="x", folder=Path("x"), config={}, print_line=print) is None
assert not any(name.split(".")[0] == "wandb" for name, module in sys.modules.items() if module)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_tracking_without_the_package_is_rejected_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as left:
        read_config("train", ["experiment=quickstart", "logging=wandb_offline"])
    assert left.value.code == 3
    assert (
        "logging.wandb.mode=offline needs the package wandb, which is not installed; try pip install wandb, or logging.wandb.mode=off"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        read_config("evaluate", ["experiment=quickstart", "logging=wandb", "data.path=nowhere"])
    assert "logging.wandb" not in capsys.readouterr().err, "an evaluation is not tracked"


def test_secrets_are_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries in the environment, the configuration and a URL: no file of a run contains them."""
    canaries = [KEY, "hf_" + "a1B2" * 8, "hunter2hunter2", "ghp_" + "Zz9" * 12, "plainsecretvalue"]
    monkeypatch.setenv("WANDB_API_KEY", canaries[0])
    monkeypatch.setenv("HF_TOKEN", canaries[1])
    config = {
        "remote": f"https://user:{canaries[2]}@example.com/x.git",
        "note": f"use {canaries[3]} today",
        "nested": [{"api_key": canaries[4], "token": canaries[1]}],
    }
    tracker = offline(tmp_path / "run", config)
    tracker.log(train_record(1) | {"stream": canaries[0]})
    tracker.finish()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written
    for path in written:
        content = path.read_bytes()
        for canary in canaries:
            assert canary.encode() not in content, f"{canary} in {path}"


def test_redact_keeps_everything_else() -> None:
    plain = {
        "lr": 3e-3,
        "tokens": [1, 2],
        "total_tokens": 10,
        "note": "sha256 is 64 digits",
        "key": None,
        "git_commit": "a" * 12,
    }
    assert redact(plain) == plain
    assert redact({"wandb_api_key": "x", "password": "", "a": ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2ln",)}) == {
        "wandb_api_key": HIDDEN,
        "password": "",
        "a": [HIDDEN],
    }
