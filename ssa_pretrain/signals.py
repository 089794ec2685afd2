"""Signals that ask a process to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C, SIGHUP from a terminal that was closed.

Python runs a signal handler only when its main thread returns to bytecode, and a rank can wait for minutes inside a collective. So Python
writes the number of the signal to a pipe (`signal.set_wakeup_fd`), and a thread reads it and acts at once. A signal that was ignored when
the process started stays ignored; this is how `nohup` ignores SIGHUP. Stdlib only.
"""

import errno
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEAT_SECONDS = 0.2  # a Ctrl-C within this time after the first is the same one, passed on by a wrapper


@contextmanager
def on_signals(
    act: Callable[[signal.Signals], None], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Calls `act` from a separate thread for each of these signals that the process receives. Only the main thread can enter the context.

    Contexts nest, and the innermost one gets the signals. A forked child gets none of its parent's.
    """
    watched = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while number := os.read(read, 1)[0]:
            if number in watched:
                act(signal.Signals(number))

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    before = {number: signal.signal(number, _do_nothing) for number in watched}
    outer = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    entered = [True]
    # A forked child shares the pipe, so a signal to the child would look like one to this process.
    os.register_at_fork(after_in_child=lambda: entered and signal.set_wakeup_fd(-1))
    try:
        yield
    finally:
        entered.clear()
        signal.set_wakeup_fd(outer)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(write, b"\0")
        if threading.current_thread() is not listener:
            listener.join()
        os.close(write)
        os.close(read)


def survive_terminal() -> None:
    """Ignores write errors of stdout and stderr after the terminal was closed or the reader exited. They would end a run without a checkpoint."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and (stream.isatty() or _is_pipe(stream)):
            raw = _RobustFile(stream.fileno(), "w", closefd=False)
            buffered = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True))


class _RobustFile(io.FileIO):
    """A terminal or a pipe that accepts writes even when nobody reads it any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return memoryview(data).nbytes


def _is_pipe(stream: Any) -> bool:
    """Returns whether a stream writes into a pipe."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream without a file
        return False


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handles a signal whose number is already in the pipe."""
