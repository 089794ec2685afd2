"""tracking_process.py and tracking_rows.py of ssa_pretrain/monitor: W&B has every step and evaluation once, whichever process is killed."""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor.tracking import start_tracking
from ssa_pretrain.monitor.tracking_rows import STATE_FILE, History, State, flatten, read_state
from support.wandb_runs import KEY, PATIENT, RESENT, evaluation_record, history, no_account, offline, train_record
from support.wandb_server import serving

__all__ = ["no_account"]

TRAINING = (
    PATIENT
    + """
import json, os, sys, time
from pathlib import Path
from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor import tracking
from ssa_pretrain.monitor.metrics import MetricsLogger
folder, mode, done, last, evaluates = Path(sys.argv[1]), WandbMode(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
settings = WandbConfig(mode=mode, project="p", entity="e")
tracker = tracking.start_tracking(settings, name="x", folder=folder, config={}, print_line=print, step=done)
metrics = MetricsLogger(folder, total_steps=60, tokens_per_step=1, resume_step=done, interval=1000, trackers=[tracker])
def evaluate(step):
    for mode in ("full", "sparse"):
        time.sleep(0.02)
        metrics.log_evaluation({"step": step, "tokens": 100 * step, "split": "heldout", "mode": mode, "cross_entropy": 1.5})
if done and done % 10 == 0 and not {(done, "full"), (done, "sparse")} <= metrics.evaluated:
    evaluate(done)
for step in range(done + 1, last + 1):
    metrics.log_step({"step": step, "tokens": 100 * step, "loss": 1.0 / step, "cross_entropy": 1.0, "learning_rate": 1.0})
    if step % 10 == 0 and (step < last or evaluates == "1"):
        evaluate(step)
print("logged", flush=True)
sys.stdin.readline()
metrics.close()
"""
)

# Steps done, last step logged, whether it is evaluated, and which processes are killed ("": none, an orderly end).
STARTS = [
    (0, 10, False, "training"),  # in the evaluation of step 10
    (5, 10, False, ""),  # evaluated late: W&B has closed the row of step 10
    (10, 20, True, "all"),
    (10, 20, False, "client"),
    (20, 27, True, "service"),
    (20, 30, False, "all"),
    (30, 40, True, "training"),
    (35, 60, True, ""),
]


def start_training(folder: Path, mode: str, done: int, last: int, evaluates: bool, killed: str) -> str:
    """Trains up to the last step of a start, kills processes, and returns the printed text."""
    command = [sys.executable, "-c", TRAINING, folder, mode, str(done), str(last), str(int(evaluates))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    printed = ""
    while (line := process.stdout.readline()) not in ("logged\n", ""):
        printed += line
    children = psutil.Process(process.pid).children(recursive=True)
    if killed in ("training", "all"):
        process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):  # it has exited already
            if killed == "all" or killed == ("service" if "core" in child.name() else "client"):
                child.kill()
    rest = process.communicate("\n" if killed not in ("training", "all") else None)[0]
    assert process.returncode == (-signal.SIGKILL if killed in ("training", "all") else 0)
    return printed + rest


@pytest.mark.parametrize(
    ("mode", "starts"), [("online", STARTS), ("offline", [*STARTS[:4], (20, 60, True, "")])], ids=["online", "offline"]
)
def test_kills_leave_every_step_and_evaluation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, starts: list[tuple]
) -> None:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        printed = [start_training(tmp_path, mode, *start) for start in starts]
        run = json.loads((tmp_path / STATE_FILE).read_text())
        rows = server.rows(run["id"]) if mode == "online" else history(tmp_path)
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
    trained = [row for row in rows if "train/loss" in row]
    assert [row["_step"] for row in trained] == [row["step"] for row in trained] == list(range(1, 61))
    assert all(row["train/loss"] == 1.0 / row["step"] and row["tokens"] == 100 * row["step"] for row in trained)
    for name in ("full", "sparse"):
        evaluated = [row for row in rows if f"heldout/{name}/cross_entropy" in row]
        assert [(row["heldout_step"], row["heldout_tokens"]) for row in evaluated] == [
            (s, 100 * s) for s in range(10, 61, 10)
        ]
    assert run["received"] == {"train": 60, "heldout/full": 60, "heldout/sparse": 60}
    for text, (*_, killed) in zip(printed, starts, strict=True):
        assert text.count(RESENT) == (killed in ("client", "service")), text
        assert ("Traceback" not in text) and text.count("\n") <= 2, text


def training(recorded: list[dict], begin: int, last: int) -> list[dict]:
    """Returns the records of a run from a step on. Steps 0, 10, 20 and 30 are evaluated in both modes unless they have been."""
    have = {(record["step"], record.get("mode")) for record in recorded}
    made = []
    for step in range(begin, last + 1):
        made += [train_record(step)] if step > begin else []
        if step in (0, 10, 20, 30):
            made += [evaluation_record(step, mode) for mode in ("full", "sparse") if (step, mode) not in have]
    return made


@pytest.mark.parametrize("seed", range(100))
def test_rows_are_complete_and_unique_after_any_loss(seed: int) -> None:
    """Each start is killed at any point, and W&B loses any number of its last rows."""
    random, stored, state, recorded = Random(seed), [], State(), []
    for start in range(8):
        steps = [0, *(record["step"] for record in recorded if record["kind"] == "train")]
        begin, last = (steps[-1], 40) if start == 7 else (random.choice(steps), random.randrange(steps[-1], 41))
        recorded = [record for record in recorded if 0 < begin >= record["step"]]  # as in metrics.jsonl after a resume
        made = training(recorded, begin, last)
        recorded += made if start == 7 else made[: random.randrange(len(made) + 1)]
        rows: list[tuple[int, dict]] = []
        last_row = stored[-1][0] if stored else -1
        session = History(state, last_row, lambda values, row, rows=rows: rows.append((row, values)), lambda: None)
        for record in recorded:
            session.add(record)
        session.finish(orderly=start == 7 or random.random() < 0.3)
        stored += rows if start == 7 else rows[: random.randrange(len(rows) + 1)]
    numbers = [row for row, _ in stored]
    assert numbers == sorted(set(numbers))
    assert [values["step"] for _, values in stored if "train/loss" in values] == list(range(1, 41))
    for mode in ("full", "sparse"):
        evaluated = [values["heldout_step"] for _, values in stored if f"heldout/{mode}/cross_entropy" in values]
        assert sorted(evaluated) == [0, 10, 20, 30]


def test_evaluation_without_a_following_step_gets_its_own_row() -> None:
    """A run is stopped and evaluated later, twice, then resumed: every step and evaluation once, later rows shifted by one per insertion."""
    stored: list[tuple[int, dict]] = []
    state, recorded = State(), [train_record(1), train_record(2)]
    for added in (
        [],
        [evaluation_record(2, "full")],
        [train_record(3), train_record(4)],
        [evaluation_record(4, "full")],
        [train_record(5)],
    ):
        recorded += added
        session = History(
            state, stored[-1][0] if stored else -1, lambda values, row: stored.append((row, values)), lambda: None
        )
        for record in recorded:
            session.add(record)
        session.finish(orderly=True)
    assert [row for row, _ in stored] == [1, 2, 3, 4, 5, 6, 7]
    assert [values.get("heldout_step") or values["step"] for _, values in stored] == [1, 2, 2, 3, 4, 4, 5]
    assert state.inserted == [3, 6] and state.step_of(7) == 5


def test_flatten_names() -> None:
    assert flatten(evaluation_record(3, "full") | {"captured_mass_by_layer": [None, 0.5]}) == {
        "tokens": 300,
        "step": 3,
        "heldout_tokens": 300,
        "heldout_step": 3,
        "heldout/full/cross_entropy": 2.5,
        "heldout/full/captured_mass/layer_01": 0.5,
    }
    task = {"kind": "task", "step": 3, "tokens": 300, "task": "arc", "mode": "sparse", "acc": 0.5, "acc_norm": None}
    assert flatten(task) == {
        "tokens": 300,
        "step": 3,
        "task_tokens": 300,
        "task_step": 3,
        "task/arc/sparse/acc": 0.5,
    }


LEFT_BEHIND = (
    PATIENT
    + """
import os, signal, sys, time
from pathlib import Path
from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor import tracking
tracker = tracking.start_tracking(WandbConfig(mode=WandbMode.offline), name="x", folder=Path(sys.argv[1]), config={}, print_line=print)
tracker.log({"kind": "train", "step": 1, "tokens": 100, "loss": 1.0})
helper = os.fork()
if helper == 0:
    os.close(1)
    time.sleep(600)
    os._exit(0)
print(helper, tracker._process._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
)


def test_process_forked_by_a_killed_run_does_not_keep_the_client_alive(tmp_path: Path) -> None:
    """The forked process keeps the pipe open, so the client's input does not close while it lives, which is until the client has gone."""
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND, tmp_path], stdout=subprocess.PIPE, text=True)
    helper, client = map(int, done.stdout.split())
    try:
        with suppress(psutil.NoSuchProcess):  # it has gone already
            psutil.Process(client).wait(90)
    finally:
        psutil.Process(helper).kill()
    assert [row["step"] for row in history(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("content", "run", "step"),
    [
        ("", None, -1),
        ("{", None, -1),
        ("[]", None, -1),
        ('{"id": 5, "row": 3}', None, -1),
        ('{"id": "a/b", "row": 3}', None, -1),
        ('{"id": "abc", "row": "x"}', None, -1),
        ('{"id": "abc", "row": 3, "evaluations": {"heldout/full": 3}}', None, -1),
        ('{"id": "abc", "received": {}}', "abc", -1),
        (
            '{"id": "abc", "received": {"train": 7, "heldout/full": 5}, "settings": "x"}',
            "abc",
            7,
        ),  # an earlier version's
        ('{"id": "abc", "row": 8, "inserted": [4]}', "abc", 7),
    ],
)
def test_damaged_state_file_starts_a_new_run(tmp_path: Path, content: str, run: str | None, step: int) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    state = read_state(tmp_path)
    assert (state.id == run) == (run is not None) and len(state.id) in (3, 8)
    assert state.step_of(state.row) == step


def test_online_start_sends_records_of_an_offline_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tracker = offline(tmp_path)
    for step in (1, 2, 3):
        tracker.log(train_record(step))
    tracker.finish()
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        settings = WandbConfig(mode=WandbMode.online, project="p", entity="e")
        again = start_tracking(settings, name="x", folder=tmp_path, config={}, print_line=lines.append, step=3)
        assert again is not None and again.id == tracker.id
        for step in (1, 2, 3, 4):
            again.log(train_record(step))
        again.finish()
        assert [row["_step"] for row in server.rows(again.id)] == [1, 2, 3, 4]
    assert lines == ["W&B: the records of offline starts are sent now; no upload is needed"]
