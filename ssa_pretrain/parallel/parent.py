"""A process that ends with the process that started it, even after kill -9. The Linux kernel does it (PR_SET_PDEATHSIG)."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, or the thread of the parent that started it.

    Args:
        parent: the process id of the parent; if the parent is already gone, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended in between
        os.kill(os.getpid(), signal.SIGKILL)


def end_forks_with_this_process() -> None:
    """Makes every process that this one forks from now on end with it, such as the process pool of a library."""
    own = os.getpid()
    os.register_at_fork(after_in_child=lambda: end_with_parent(own))
