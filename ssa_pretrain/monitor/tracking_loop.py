"""The loop of a tracker's process: reads training's messages from standard input and hands them to the session of W&B, TensorBoard or trackio.

tracking_client.py starts the process. Messages are lines of JSON: the opening, then records, {"alert": …}, and {"finish": true}.

Every exception ends this process, and every wait in it has an alarm or a deadline. Training reports the end and continues. If training dies,
standard input closes, and this process passes on the received records before it exits.
"""

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, TextIO

import psutil

from ssa_pretrain.monitor.alerts import Alert, Level
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.settings.files import LockedError, lock, unlock

START_SECONDS = 25
END_SECONDS = 10

Send = Callable[[Mapping[str, Any]], None]


class Session(Protocol):
    """One start's run of a tracker. Built from training's first message and a function that sends a message to training."""

    def ready(self) -> dict[str, Any]:
        """Returns what training is told once records are taken."""
        ...

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the next record of the run; after a restart, again from the first one on."""
        ...

    def alert(self, alert: Alert) -> None:
        """Sends an alert."""
        ...

    def finish(self, *, orderly: bool) -> None:
        """Ends the tracking; `orderly` is False if training was killed."""
        ...


def serve(build: Callable[[Mapping[str, Any], Send], Session], *, lock_name: str) -> None:
    """Passes the messages on standard input to a session until `finish` or the end of the input.

    Args:
        build: returns the session.
        lock_name: of a file in the run's folder, which the process of the previous start holds until it exits.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library's output goes to the log
    send = partial(_send, channel)
    sys.excepthook = partial(_report_exception, send)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for training; when it ends, the input closes
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, partial(_exit_at_once, send))
    messages = _messages(int(sys.argv[1]))
    opening = next(messages)
    patience = END_SECONDS + 2  # the process of the previous start exits within END_SECONDS after its training
    held = None
    with suppress(LockedError, OSError):
        held = lock(Path(opening["folder"]) / lock_name, patience=patience, patience_if_alive=patience)
    signal.alarm(START_SECONDS)
    session = build(opening, send)
    signal.alarm(0)
    send({"ready": session.ready()})
    orderly = False
    for message in messages:
        if orderly := "finish" in message:
            break
        if "alert" in message:
            session.alert(Alert(**message["alert"] | {"level": Level(message["alert"]["level"])}))
        else:
            session.add(message)
    session.finish(orderly=orderly)
    send({"finished": True})
    if held:
        unlock(held)


def _messages(training: int) -> Iterator[dict[str, Any]]:
    """Yields the messages on standard input until it closes or training ends: processes forked by training may keep the pipe open."""
    partial_line = b""
    while True:
        if select.select([0], [], [], 1.0)[0]:
            chunk = os.read(0, 2**16)
            if not chunk:
                return
            *lines, partial_line = (partial_line + chunk).split(b"\n")
            yield from map(json.loads, lines)
        elif os.getppid() != training:
            return


def _send(channel: TextIO, message: Mapping[str, Any]) -> None:
    """Sends a message to training, if it still runs."""
    with suppress(BrokenPipeError):
        channel.write(json.dumps(message) + "\n")
        channel.flush()


def _report_exception(send: Send, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Logs the exception that ends this process and sends its first line."""
    traceback.print_exception(kind, error, trace)
    lines = redact(str(error)).splitlines()
    send({"failed": lines[0] if lines else kind.__name__})


def _exit_at_once(send: Send, _: int, __: FrameType | None) -> None:
    """Kills the library's own processes and exits."""
    send({"failed": "its service does not answer"})
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
