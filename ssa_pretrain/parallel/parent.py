"""A process that ends with the one that started it, however that ends: the kernel sees to it (Linux, PR_SET_PDEATHSIG)."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, or the parent's thread that started it.

    Args:
        parent: the parent's process id; if it is gone already, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def forks_end_with_this() -> None:
    """Have every process that this one forks from now on end with it: the pools of a library, for one."""
    own = os.getpid()
    os.register_at_fork(after_in_child=lambda: end_with_parent(own))
