"""Weights & Biases as a view of a run: one W&B run per training run across restarts, and never a reason to stop or to wait.

W&B's client runs in a process of its own (`tracking_process.py`), and training only writes records to a pipe. Whatever the client or its
service does there (an exception of any class, an exit, a crash, a hang) ends that process, not the training: one line reports it, the run goes
on untracked, and the next start sends what is missing. Nothing here waits longer than its limit.

A restart takes up the id in the run's folder (`wandb.json`) and is shown metrics.jsonl from its beginning; what W&B has of it is not sent
again. If training is killed, the pipe ends, and the process hands over what it was sent before it ends too.

The run's configuration carries the resolved settings, the code's git commit and the data manifest's hash; what looks like a secret is
replaced before it leaves the process, and neither code, console output nor git remotes are sent. A server that is away, slow or broken costs
seconds, once, at the start: the run then writes offline and prints the command that uploads it later. Stdlib only.
"""

import hashlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.settings.problems import SECRET

CLIENT_SECONDS = 8.0  # for each of W&B's service, login and server, at the start
START_SECONDS = 60.0  # for W&B's process to be ready: importing its client on a busy machine takes most of it
FINISH_SECONDS = 11.0  # for the upload of the last rows
CLOSE_SECONDS = 2.0
STALL_SECONDS = 60.0  # without a byte taken, after which W&B's process counts as hung
MOST_WAITING = 2**24  # bytes in memory, above which training waits for W&B's process to read
LOG = "wandb/process.log"
STATE_FILE = "wandb.json"
HIDDEN = "<hidden>"

# Shapes of credentials: W&B, Hugging Face, GitHub, AWS, OpenAI-like keys, JSON web tokens, and passwords inside URLs.
_CREDENTIAL = re.compile(
    r"\b[0-9a-f]{40}\b|\bwandb_v1_\w{20,}|\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bsk-[\w-]{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_PROGRAM = "from ssa_pretrain.tracking_process import main; main()"


def redact(value: Any) -> Any:
    """Returns the value with everything that looks like a secret replaced: entries by their key's name, strings by their shape.

    Args:
        value: mappings, lists and plain values, nested in any way.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if SECRET.search(str(key)) and item else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _CREDENTIAL.sub(HIDDEN, value)
    return value


def provenance(source: Path, data: Path | None) -> dict[str, Any]:
    """Returns where a run's code and data come from: git commit, whether files differ from it, sha256 of the data's manifest.

    Args:
        source: a folder of the code; outside of a git checkout the commit is None.
        data: the dataset's folder.
    """
    commit = _git(source, "rev-parse", "--short=12", "HEAD")  # all 40 digits would look like a W&B key
    manifest = data / "manifest.json" if data is not None else None
    return {
        "git_commit": commit,
        "git_dirty": bool(_git(source, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        "data_manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()
        if manifest is not None and manifest.is_file()
        else None,
    }


class Tracker:
    """A W&B run that takes the records of metrics.jsonl, from the first one on after every restart.

    Args:
        process: W&B's process, ready.
        say: writes one line to the user.
    """

    def __init__(self, process: "_Process", say: Callable[[str], None]) -> None:
        assert process.ready is not None
        self._process: _Process | None = process
        self._say = say
        self.id: str = process.ready["id"]
        self._stored_step: int = process.ready["step"]
        self._sync = f"wandb sync {shlex.quote(process.ready['folder'])}"
        self._offline: bool = process.ready["offline"]

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands a record over unless W&B has it from before a restart.

        Args:
            record: a record of metrics.jsonl.
        """
        if self._process is None or (record["kind"] == "train" and record["step"] <= self._stored_step):
            return
        self._process.send(record)
        self._process.pump()
        while self._process.waiting > MOST_WAITING and not self._process.failure():
            self._process.pump(1.0)
        if reason := self._process.failure():
            self._process.end(0.0)
            self._process = None
            self._say(
                f"W&B stopped taking records ({reason}); training and metrics.jsonl go on, and the next start sends what W&B lacks"
            )

    def finish(self) -> None:
        """Ends the run; what could not be uploaded in time is sent by the next start, and stays on disk for `wandb sync`."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send({"finish": True})
        process.end(FINISH_SECONDS)
        if not process.finished:
            reason = process.failure() or f"no end after {FINISH_SECONDS:g} s"
            self._say(
                f"W&B did not finish ({reason}); the next start sends what W&B lacks, or upload with: {self._sync}"
            )
        elif self._offline:
            self._say(f"W&B wrote offline; upload with: {self._sync}")


def start_tracking(
    settings: WandbConfig,
    *,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    say: Callable[[str], None],
    step: int = 0,
    decisive: Mapping[str, Any] | None = None,
) -> Tracker | None:
    """Starts or resumes the W&B run of an output folder; returns None where it is switched off or cannot start.

    Args:
        settings: the configuration's `logging.wandb`.
        name: the run's name.
        folder: the run's output folder.
        config: the resolved configuration and provenance, plain values; secrets are taken out here.
        say: writes one line to the user.
        step: the step that the run goes on after.
        decisive: the part of the configuration that decides the run's values. If it changed since W&B took steps that are now to be trained
            again, their values will differ: that is a new run of W&B.
    """
    if settings.mode is WandbMode.off:
        return None
    digest = hashlib.sha256(json.dumps(decisive or {}, sort_keys=True, default=str).encode()).hexdigest()
    opening = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": settings.tags,
        "name": name,
        "folder": str(folder),
        "config": redact(dict(config)),
        "step": step,
        "settings": digest,
        "patience": CLIENT_SECONDS,
    }
    for mode in ("online", "offline") if settings.mode is WandbMode.online else ("offline",):
        after = "writing offline" if mode == "online" else "going on without it"
        try:
            process = _Process(folder / LOG, say)
        except OSError as error:
            say(f"W&B {mode} cannot start ({error.strerror or error}); {after}")
            continue
        process.send(opening | {"mode": mode})
        if process.wait_ready(START_SECONDS):
            return Tracker(process, say)
        reason = process.failure() or f"not ready after {START_SECONDS:g} s"
        process.end(0.0)
        say(f"W&B {mode} cannot start ({reason}); {after}")
    return None


def lacks(settings: WandbConfig, folder: Path, newest: Mapping[str, int]) -> bool:
    """Returns whether the W&B run of an output folder ended without records that the run has; False where there is none, or W&B is off.

    Args:
        settings: the configuration's `logging.wandb`.
        folder: the run's output folder.
        newest: the last step of each series that the run has.
    """
    if settings.mode is WandbMode.off:
        return False
    try:
        received = json.loads((folder / STATE_FILE).read_text())["received"]
        return any(int(received.get(name, -1)) < step for name, step in newest.items())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False


class _Process:
    """W&B's process and the pipes to it; no call raises for what happens there, or blocks without a limit.

    Args:
        log: the file that takes what W&B's client and service print.
        say: takes the lines that the process has for the user.

    Attributes:
        ready: what the process said when it could take records: W&B's id, last step and folder; None before.
        finished: whether it handed over everything and W&B ended the run.
    """

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(place for place in sys.path if place)
        # A service that another program shares by WANDB_SERVICE may hold this run, and may end at any time.
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | {"PYTHONPATH": path}
        with log.open("ab") as file:
            self._log_start = file.tell()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=file,
                env=environment,
                start_new_session=True,  # a Ctrl-C is training's: it ends the run, and the run this
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._input, self._output = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._to_write, self._read = bytearray(), b""
        self._progress = time.monotonic()
        self._closed = False  # the process reads or writes no more
        self._reason = ""
        self.ready: dict[str, Any] | None = None
        self.finished = False

    @property
    def waiting(self) -> int:
        """Bytes that the process has not taken yet."""
        return len(self._to_write)

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues a message; `pump` writes it."""
        if not self._to_write:
            self._progress = time.monotonic()
        self._to_write += json.dumps(message, default=str).encode() + b"\n"

    def pump(self, seconds: float = 0.0) -> None:
        """Writes and reads what the pipes take and hold, after waiting at most `seconds` for either."""
        if self._closed:
            return
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if self._to_write:
            poll.register(self._input, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        try:
            while self._input in ready and self._to_write:
                del self._to_write[: os.write(self._input, self._to_write[: 2**16])]
                self._progress = time.monotonic()
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._to_write.clear()  # it has ended; what it said last is read below and in `end`
        if self._output in ready:
            chunk = os.read(self._output, 2**16)
            self._closed = not chunk
            *lines, self._read = (self._read + chunk).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def wait_ready(self, seconds: float) -> bool:
        """Returns whether the process took up the run within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.ready is None and not self.failure() and time.monotonic() < deadline:
            self.pump(0.5)
        return self.ready is not None and not self._closed

    def failure(self) -> str:
        """Returns why the process takes no more records; empty while it does."""
        if self._reason:
            return self._reason
        if self._closed:
            try:
                code = self._child.wait(1.0)
            except subprocess.TimeoutExpired:
                return "its process closed the pipe"
            if code < 0:
                return f"its process was killed by {signal.Signals(-code).name}"
            return f"its process ended with exit code {code}{self._last_line()}"
        if self._to_write and time.monotonic() - self._progress > STALL_SECONDS:
            return f"its process has taken nothing for {STALL_SECONDS:g} s"
        return ""

    def end(self, seconds: float) -> None:
        """Waits at most `seconds` for the process to end by itself, then ends it; a finished one is only closing its files and connections."""
        deadline, finished = time.monotonic() + seconds, self.finished
        while not self._closed and (left := deadline - time.monotonic()) > 0:
            self.pump(min(0.5, left))
            if self.finished and not finished:
                deadline, finished = min(deadline, time.monotonic() + CLOSE_SECONDS), True
        self.failure()
        for number in (signal.SIGALRM, signal.SIGKILL):  # the first lets it end W&B's service too
            if self._child.poll() is not None:
                break
            self._child.send_signal(number)
            try:
                self._child.wait(2.0)
            except subprocess.TimeoutExpired:
                continue
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        """Notes what the process said."""
        if "say" in message:
            self._say(message["say"])
        self.ready = message.get("ready", self.ready)
        self._reason = message.get("failed", self._reason)
        self.finished = message.get("finished", self.finished)

    def _last_line(self) -> str:
        """Returns the last line of the log since this process began, which mostly says why it ended."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {redact(last)[:200]}" if last else ""


def series(record: Mapping[str, Any]) -> str:
    """Returns the name of the series that a record continues: train, or split and mode of an evaluation."""
    return "train" if record["kind"] == "train" else f"{record['split']}/{record['mode']}"


def flatten(record: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Returns a record as W&B's flat names; a list by layer becomes one name per layer, missing values none.

    Args:
        record: a record of metrics.jsonl.
    """
    prefix = series(record)
    flat: dict[str, float | int | str] = {"tokens": record["tokens"], "step": record["step"]}
    if record["kind"] != "train":  # its own x axis: a late evaluation goes into a later step's row
        flat |= {f"{record['split']}_tokens": record["tokens"], f"{record['split']}_step": record["step"]}
    for key, value in record.items():
        if key in ("kind", "split", "mode", "tokens", "step") or value is None:
            continue
        if isinstance(value, list | tuple):
            name = key.removesuffix("_by_layer")
            flat |= {f"{prefix}/{name}/layer_{i:02d}": item for i, item in enumerate(value) if item is not None}
        else:
            flat[f"{prefix}/{key}"] = value
    return flat


def _git(folder: Path, *arguments: str) -> str | None:
    """A git command's output; None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
