"""Output of a command: its version line, and writing to a pipe whose reader may exit early, as `head` does."""

import io
import os
import platform
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version

from ssa_pretrain.errors import ExitCode


@contextmanager
def pipe_may_close() -> Iterator[None]:
    """Ends the process quietly, with 141, once the program that reads its output has ended."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_gone():
            raise
        discard_output()
        raise SystemExit(ExitCode.READER_GONE) from None


def reader_gone() -> bool:
    """Returns whether the program that reads our output has ended."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Discards buffered output, so that the interpreter's exit does not fail on it."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def captured(act: Callable[[], object]) -> tuple[str, int]:
    """Returns a call's output and its exit code."""
    with redirect_stdout(io.StringIO()) as text:
        try:
            act()
        except SystemExit as leaving:
            return text.getvalue(), leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return text.getvalue(), 0


def version_line(program: str, packages: Sequence[str]) -> str:
    """Returns a program's version and the versions of the installed packages, without importing them."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{program} {version('ssa-pretrain')} ({', '.join(found)})"
