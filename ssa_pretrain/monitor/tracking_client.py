"""The training side of a tracker's process (W&B, TensorBoard, trackio): starts it, sends messages through a pipe, reads its answers. Stdlib only.

Messages are lines of JSON. Training sends the opening, then records and {"alert": …}, then {"finish": true}. The process answers with
{"ready": {…}}, lines for the user ({"print": …}), {"failed": reason} and {"finished": true}. No call raises because of what happens in the
process, and none blocks without a limit.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.monitor.redaction import redact

STALL_SECONDS = 60.0  # without a byte read, after which the process counts as hung
CLOSE_SECONDS = 2.0  # for closing files and connections after the run has finished
ALARM_SECONDS = 2.0  # for the process to kill its library's service and exit, after which it is killed itself
CHUNK = 2**16  # bytes of one read or write
PROGRAM = "from ssa_pretrain.monitor.{module} import main; main()"


class ClientProcess:
    """A tracker's process and the pipes to it.

    Args:
        log: file for the output of the tracker's library and its service.
        print_line: prints the lines that the process has for the user.
        module: of this package, whose `main` the process runs.

    Attributes:
        ready: sent by the process once it takes records, such as W&B's id, last step and folder; None before.
        finished: whether the process passed everything on and the tracker's run ended.
    """

    def __init__(self, log: Path, print_line: Callable[[str], None], module: str = "tracking_process") -> None:
        self._print_line = print_line
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(place for place in sys.path if place)
        # WANDB_SERVICE names a service shared with another program. It could end at any time, so the run gets a service of its own.
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | {"PYTHONPATH": path}
        with log.open("ab") as file:
            self._log_start = file.tell()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM.format(module=module), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training, which then ends this process in order
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._input, self._output = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._to_write, self._partial_line = bytearray(), b""
        self._last_write = time.monotonic()
        self._closed = False  # the process has closed its output
        self._reason = ""
        self.ready: dict[str, Any] | None = None
        self.finished = False

    @property
    def waiting(self) -> int:
        """Bytes that the process has not read yet."""
        return len(self._to_write)

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues a message; `pump` writes it."""
        if not self._to_write:
            self._last_write = time.monotonic()
        self._to_write += json.dumps(message, default=str).encode() + b"\n"

    def pump(self, seconds: float = 0.0) -> None:
        """Writes and reads whatever is possible without blocking, after waiting at most `seconds` for either pipe."""
        if self._closed:
            return
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if self._to_write:
            poll.register(self._input, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        try:
            while self._input in ready and self._to_write:
                del self._to_write[: os.write(self._input, self._to_write[:CHUNK])]
                self._last_write = time.monotonic()
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._to_write.clear()  # the process has ended; its last messages are read below and in `end`
        if self._output in ready:
            chunk = os.read(self._output, CHUNK)
            self._closed = not chunk
            *lines, self._partial_line = (self._partial_line + chunk).split(b"\n")
            for line in lines:
                self._receive(json.loads(line))

    def drain(self, seconds: float) -> None:
        """Waits at most `seconds` until the process has read all messages."""
        deadline = time.monotonic() + seconds
        self.pump()
        while self._to_write and not self.failure() and time.monotonic() < deadline:
            self.pump(0.1)

    def wait_ready(self, seconds: float) -> bool:
        """Returns whether the process is ready for records within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.ready is None and not self.failure() and time.monotonic() < deadline:
            self.pump(0.5)
        return self.ready is not None and not self._closed

    def failure(self) -> str:
        """Returns why the process no longer takes records; empty while it does."""
        if self._reason:
            return self._reason
        if self._closed:
            try:
                code = self._child.wait(1.0)
            except subprocess.TimeoutExpired:
                return "its process closed the pipe"
            if code < 0:
                return f"its process was killed by {signal.Signals(-code).name}"
            return f"its process ended with exit code {code}{self._last_log_line()}"
        if self._to_write and time.monotonic() - self._last_write > STALL_SECONDS:
            return f"its process has read nothing for {STALL_SECONDS:g} s"
        return ""

    def end(self, seconds: float) -> None:
        """Waits at most `seconds` for the process to exit, then kills it. Once it has finished, it gets CLOSE_SECONDS at most."""
        deadline, finished = time.monotonic() + seconds, self.finished
        while not self._closed and (left := deadline - time.monotonic()) > 0:
            self.pump(min(0.5, left))
            if self.finished and not finished:
                deadline, finished = min(deadline, time.monotonic() + CLOSE_SECONDS), True
        self.failure()  # reaps a process that has exited
        for number in (signal.SIGALRM, signal.SIGKILL):  # on SIGALRM it also kills W&B's service
            if self._child.poll() is not None:
                break
            self._child.send_signal(number)
            try:
                self._child.wait(ALARM_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()

    def _receive(self, message: Mapping[str, Any]) -> None:
        """Handles a message of the process."""
        if "print" in message:
            self._print_line(message["print"])
        self.ready = message.get("ready", self.ready)
        self._reason = message.get("failed", self._reason)
        self.finished = message.get("finished", self.finished)

    def _last_log_line(self) -> str:
        """Returns the last line that this process logged, which usually tells why it ended."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {redact(last)[:200]}" if last else ""
