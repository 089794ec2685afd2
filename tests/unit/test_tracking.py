"""ssa_pretrain/tracking.py against the real W&B client: offline files read back, servers that are away, broken or mute, secrets."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.tracking import HIDDEN, STATE_FILE, Tracker, flatten, provenance, redact, start_tracking

KEY = "0123456789abcdef" * 2 + "01234567"  # 40 hex digits, the shape of a W&B key
BLOCK = 32_768


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the machine's W&B key nor its settings reach a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def stored_records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold chunks of crc (4), length (2), type (1: whole, 2: first, 3: middle, 4: last) and data.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def finish(tracker: Tracker, folder: Path) -> None:
    """Ends a run and waits for its file: W&B's other process closes it a moment later."""
    tracker.finish()
    newest = segments(folder)[-1]
    end = time.monotonic() + 60
    while "exit" not in [record.WhichOneof("record_type") for record in stored_records(newest)]:
        assert time.monotonic() < end, f"{newest} was not finished"
        time.sleep(0.1)


def history(folder: Path) -> list[dict]:
    """Every row of every segment of a run, in the order of upload."""
    rows = []
    for file in segments(folder):
        for record in stored_records(file):
            if record.WhichOneof("record_type") == "history":
                rows.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    return rows


def train_record(step: int) -> dict:
    layers = [0.5, 0.25]
    return {
        "kind": "train",
        "step": step,
        "tokens": 100 * step,
        "loss": 1.0 / step,
        "captured_mass_by_layer": layers,
        "mfu": None,
    }


def evaluation_record(step: int, mode: str) -> dict:
    return {
        "kind": "evaluation",
        "step": step,
        "tokens": 100 * step,
        "split": "heldout",
        "mode": mode,
        "cross_entropy": 2.5,
    }


def offline(folder: Path, config: dict | None = None, lines: list[str] | None = None) -> Tracker:
    settings = WandbConfig(mode=WandbMode.offline, project="p", group="g", tags=["t"])
    tracker = start_tracking(
        settings, name="a-run", folder=folder, config=config or {}, say=(lines if lines is not None else []).append
    )
    assert tracker is not None
    return tracker


def test_off_writes_nothing(tmp_path: Path) -> None:
    assert start_tracking(WandbConfig(), name="x", folder=tmp_path / "run", config={}, say=pytest.fail) is None
    assert not (tmp_path / "run").exists()


def test_offline_run_reads_back(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = offline(tmp_path, {"optim": {"lr": 0.5}, "data_manifest_sha256": "abc"}, lines)
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    tracker.log(evaluation_record(3, "sparse"))
    finish(tracker, tmp_path)
    tracker.finish()

    (file,) = segments(tmp_path)
    kinds: dict[str, list[Record]] = {}
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
        ("tokens", ""),
        ("*", "tokens"),
    }
    rows = history(tmp_path)
    assert [(row["tokens"], row["train/loss"]) for row in rows[:3]] == [(100, 1.0), (200, 0.5), (300, 1 / 3)]
    assert rows[0]["train/captured_mass/layer_01"] == 0.25 and "train/mfu" not in rows[0]
    assert rows[2]["heldout/sparse/cross_entropy"] == 2.5 and rows[2]["_step"] == 3
    assert len(lines) == 1 and lines[0].startswith("W&B wrote offline; upload with: wandb sync ")
    assert Path(lines[0].rsplit(" ", 1)[1]) == file.parent


def test_one_wandb_run_over_restarts_and_no_step_twice(tmp_path: Path) -> None:
    """Stop after step 6, resume from the checkpoint of step 4, twice over: one id, each step once."""
    ids = set()
    for first, last in ((1, 6), (5, 8), (7, 10)):
        tracker = offline(tmp_path)
        ids.add(tracker.id)
        for step in range(first, last + 1):
            tracker.log(train_record(step))
        tracker.log(evaluation_record(last, "full"))
        tracker.log(evaluation_record(last, "sparse"))
        finish(tracker, tmp_path)
    rows = history(tmp_path)
    assert len(ids) == 1 and len(segments(tmp_path)) == 3
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))
    for mode in ("full", "sparse"):
        assert [row["step"] for row in rows if f"heldout/{mode}/cross_entropy" in row] == [6, 8, 10]


def test_steps_that_other_settings_make_again_are_another_wandb_run(tmp_path: Path) -> None:
    """As after a loss that diverged: from the checkpoint of step 4 with a lower learning rate, in the same folder."""
    ids, lines = [], []
    for step, rate, last in ((0, 0.5, 6), (4, 0.5, 7), (4, 0.1, 8), (8, 0.05, 9)):
        settings = WandbConfig(mode=WandbMode.offline, project="p")
        tracker = start_tracking(
            settings, name="x", folder=tmp_path, config={}, say=lines.append, step=step, decisive={"optim.lr": rate}
        )
        assert tracker is not None
        ids.append(tracker.id)
        for number in range(1, last + 1):  # a restart is shown the records from the first on
            tracker.log(train_record(number))
        finish(tracker, tmp_path)
    assert ids[0] == ids[1] != ids[2], "the same settings go on in the same run"
    assert ids[3] == ids[2], "and so do others where nothing is made again"
    assert [line for line in lines if "a new run" in line] == [
        "W&B: a new run, since it has steps after 4 of other settings"
    ]


def test_a_state_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tracker = offline(tmp_path, lines=lines)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for step in (1, 2, 3):
        tracker.log(train_record(step))
        tracker._settle(0.0)
    assert (
        len(lines) == 1 and "wandb.json cannot be written (No space left on device); training and W&B go on" in lines[0]
    )
    monkeypatch.undo()
    finish(tracker, tmp_path)
    assert json.loads((tmp_path / STATE_FILE).read_text())["received"] == {"train": 3}


WRITER = """
import sys
from pathlib import Path
from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.metrics import MetricsLogger
from ssa_pretrain.tracking import start_tracking
folder, done, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = start_tracking(WandbConfig(mode=WandbMode.offline), name="x", folder=folder, config={}, say=print)
metrics = MetricsLogger(folder, total_steps=90, tokens_per_step=1, resume_step=done, interval=1000, tracker=tracker)
for step in range(done + 1, last + 1):
    metrics.log_step({"step": step, "tokens": step, "loss": 1.0 / step, "cross_entropy": 1.0, "learning_rate": 1.0})
print("logged", flush=True)
sys.stdin.read()
metrics.close()
"""


def test_kill_9_leaves_no_gap_and_what_it_repeats_is_equal(tmp_path: Path) -> None:
    """Killed after steps 50 and 80, resumed from the checkpoints of steps 40 and 70; W&B's client loses what it held."""
    for done, last in ((0, 50), (40, 80), (70, 90)):
        command = [sys.executable, "-c", WRITER, tmp_path, str(done), str(last)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdin is not None
        while process.stdout.readline() not in ("logged\n", ""):
            pass
        if last < 90:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    rows = history(tmp_path)
    assert {row["step"] for row in rows} == set(range(1, 91))
    assert all(row["train/loss"] == 1.0 / row["step"] and row["_step"] == row["step"] for row in rows)
    assert len(segments(tmp_path)) == 3
    assert json.loads((tmp_path / STATE_FILE).read_text())["received"] == {"train": 90}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "abc", "received": {}}'])
def test_a_damaged_state_file_starts_a_run_all_the_same(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    tracker = offline(tmp_path)
    tracker.log(train_record(1))
    finish(tracker, tmp_path)
    state = json.loads((tmp_path / STATE_FILE).read_text())
    assert (state["id"], state["received"]) == (tracker.id, {"train": 1})
    assert (tracker.id == "abc") == ("abc" in content)


class Broken(BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing on the console."""


@pytest.fixture(params=["refused", "mute", "broken"])
def bad_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A W&B server's address on this machine where nobody listens, nobody answers, or every answer is an error."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if request.param == "mute":
            listener.listen(50)
        elif request.param == "broken":
            server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            server.server_close()
            return
        yield address


def test_a_server_that_does_not_serve_costs_seconds_and_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", bad_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lines: list[str] = []
    began = time.monotonic()
    tracker = start_tracking(WandbConfig(mode=WandbMode.online), name="x", folder=tmp_path, config={}, say=lines.append)
    assert time.monotonic() - began < 15
    assert tracker is not None
    assert (
        len(lines) == 1 and lines[0].startswith("W&B online cannot start (") and lines[0].endswith("; writing offline")
    )
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    finish(tracker, tmp_path)
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3]
    assert "wandb sync" in lines[1]


def test_no_key_means_offline_and_no_question(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = start_tracking(WandbConfig(mode=WandbMode.online), name="x", folder=tmp_path, config={}, say=lines.append)
    assert tracker is not None and len(lines) == 1 and lines[0].endswith("; writing offline")
    tracker.finish()


def test_a_dead_wandb_process_ends_tracking_and_not_the_training(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time, psutil
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.tracking import start_tracking
lines = []
tracker = start_tracking(WandbConfig(mode=WandbMode.offline), name="x", folder=Path(sys.argv[1]), config={}, say=lines.append)
tracker.log({"kind": "train", "step": 1, "tokens": 1, "loss": 1.0})
for child in psutil.Process().children(recursive=True):
    child.kill()
began = time.monotonic()
for step in range(2, 200):
    tracker.log({"kind": "train", "step": step, "tokens": step, "loss": 1.0})
    time.sleep(0.005)
tracker.finish()
assert time.monotonic() - began < 15, time.monotonic() - began
assert len(lines) == 1, lines
print(lines[0])
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path, "."], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl goes on" in done.stdout or "upload later with: wandb sync" in done.stdout


def test_secrets_reach_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries in the environment, the configuration and a URL: none of their bytes in anything that a run writes."""
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
    finish(tracker, tmp_path / "run")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written
    for path in written:
        content = path.read_bytes()
        for canary in canaries:
            assert canary.encode() not in content, f"{canary} in {path}"


def test_redact_keeps_what_is_no_secret() -> None:
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


def test_flatten_names() -> None:
    assert flatten(evaluation_record(3, "full") | {"captured_mass_by_layer": [None, 0.5]}) == {
        "tokens": 300,
        "step": 3,
        "heldout/full/cross_entropy": 2.5,
        "heldout/full/captured_mass/layer_01": 0.5,
    }


def test_provenance_of_a_checkout_and_of_a_bare_folder(tmp_path: Path) -> None:
    assert provenance(tmp_path, None) == {"git_commit": None, "git_dirty": None, "data_manifest_sha256": None}
    run = {"cwd": tmp_path, "check": True, "capture_output": True}
    subprocess.run(["git", "init", "-q"], **run)
    (tmp_path / "manifest.json").write_text("{}")
    subprocess.run(["git", "add", "manifest.json"], **run)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"], **run)
    found = provenance(tmp_path, tmp_path)
    assert len(found["git_commit"]) == 12 and found["git_dirty"] is False
    assert found["data_manifest_sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    (tmp_path / "manifest.json").write_text("{ }")
    assert provenance(tmp_path, None)["git_dirty"] is True
