"""Signals that ask a process to stop: SIGTERM of schedulers, SIGINT of Ctrl-C, SIGHUP of a terminal that was closed.

Python runs a signal handler only when its main thread returns to bytecode, and a rank can wait for minutes inside a collective. So the signal's
number goes through a pipe (`signal.set_wakeup_fd`) to a thread, which acts at once. A signal that was ignored when the process started stays
ignored: `nohup` ignores SIGHUP that way. Stdlib only.
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

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECOND_SECONDS = 0.2  # a Ctrl-C so soon after the first is the same one, which a wrapper has passed on
STOPPED = 7  # exit code of a run that was asked to stop; the same command goes on
INTERRUPTED = 130  # exit code, as shells report it, of what Ctrl-C ended at once


@contextmanager
def on_signals(act: Callable[[signal.Signals], None], signals: Sequence[signal.Signals] = STOPS) -> Iterator[None]:
    """Calls `act`, from a thread of its own, with each of these signals that the process receives. Only the main thread can enter it.

    Contexts nest: the innermost receives the signals. A forked child receives none of its parent's.
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
    before = {number: signal.signal(number, _noted) for number in watched}
    outer = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    entered = [True]
    # The pipe is shared with a forked child: a signal to the child would look like one to this process.
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


@contextmanager
def leaves_on_ctrl_c(program: str, sentence: str = "interrupted") -> Iterator[None]:
    """Ends the process at once and with one line when Ctrl-C is pressed: for programs that keep nothing half done."""

    def leave(number: signal.Signals) -> None:
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    with on_signals(leave, [signal.SIGINT]):
        yield


def survive_terminal() -> None:
    """Lets this process write on when its terminal is closed or the program that reads its output ends: an error there would end a run unsaved."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and (stream.isatty() or _is_pipe(stream)):
            raw = _Reader(stream.fileno(), "w", closefd=False)
            buffered = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True))


class _Reader(io.FileIO):
    """A terminal or a pipe that takes what is written even when nobody reads it any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return memoryview(data).nbytes


def _is_pipe(stream: Any) -> bool:
    """Whether a stream is written into a pipe."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # one without a file below it
        return False


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing: the pipe has the signal's number already."""
