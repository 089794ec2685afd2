"""DeepSpeed's launcher under ours: the same arguments, without its exit code 0 after a signal has ended the processes that it started.

Its runner returns 0 when its child (the launcher of a node, or pdsh) is killed, for example by the kernel when memory runs out. This process then ends by
the same signal. When our launcher ends, even by kill -9, this process gets a SIGTERM: on several nodes the runner answers it by ending the ranks of
all nodes, and on one node the ranks notice by themselves.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ssa_pretrain.process import ALIVE, LAUNCH


def main() -> int:
    """Runs DeepSpeed's launcher with the command line's arguments and returns its exit code."""
    terminate_when_launcher_ends(Path(os.environ[LAUNCH]))
    started: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    from deepspeed.launcher import runner

    subprocess.Popen = Recorded
    try:
        runner.main(sys.argv[1:])
    except SystemExit as ending:
        if ending.code:
            return ending.code if isinstance(ending.code, int) else 1
    for child in started:
        if (child.returncode or 0) < 0:
            end_by(signal.Signals(-child.returncode))
    return 0


def end_by(number: signal.Signals) -> None:
    """Ends this process by a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    if number is not signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def terminate_when_launcher_ends(folder: Path) -> None:
    """Starts a thread that sends this process a SIGTERM when our launcher ends."""

    def wait() -> None:
        descriptor = os.open(folder / ALIVE, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
