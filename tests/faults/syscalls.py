"""Stops a process at each system call that changes files: a seccomp filter reports those calls, and ptrace hands them to a function.

The process that is examined calls `report_changes`, from the thread whose calls count. Threads that it starts later are included. Its parent calls
`trace`, which gets every call before the kernel carries it out. So killing at call n leaves exactly the first n - 1 changes. Calls that only read cost
nothing. Linux on x86-64 and aarch64, without privileges; no program such as strace is needed.

What it cannot show: what the disk holds after a power failure. `publishing.py` judges that by the order of writes and flushes.
"""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CALLS = {
    "x86_64": {
        "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75, "truncate": 76,
        "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "openat": 257, "mkdirat": 258,
        "unlinkat": 263, "renameat": 264, "linkat": 265, "fallocate": 285, "renameat2": 316, "copy_file_range": 326,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46, "fallocate": 47, "openat": 56,
        "write": 64, "writev": 66, "pwrite64": 68, "sendfile": 71, "fsync": 82, "fdatasync": 83, "renameat2": 276, "copy_file_range": 285,
    },
}  # fmt: skip
BY_DESCRIPTOR = {"write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "fallocate"}
FLAGS_AT = {"open": 1, "openat": 2}  # the argument that says whether a file is opened for writing
SEIZE, CONT, SYSCALL_INFO = 0x4206, 7, 0x420E  # requests of ptrace
SECCOMP_STOP = 7
OPTIONS = (
    0x2 | 0x4 | 0x8 | 0x80 | 0x100000
)  # follow forks, vforks and clones; report seccomp; kill the process with its tracer
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER_MODE = 38, 22, 2
ALLOW, REPORT = 0x7FFF0000, 0x7FF00000  # answers of a filter
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of a filter: load a word, jump if equal, return

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to change files.

    Attributes:
        thread: that makes it.
        name: such as "write".
        arguments: six numbers.
        path: of the file that it changes.
        target: the new path, if it renames.
    """

    thread: int
    name: str
    arguments: tuple[int, ...]
    path: str
    target: str = ""

    def do_half(self) -> bool:
        """Writes the first half of what a `write` would, as a kill within a call can leave it; returns whether that was possible."""
        descriptor, address, size = self.arguments[:3]
        if self.name != "write" or size < 2:
            return False
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            data = memory.read(size // 2)
        fields = dict(
            line.split(":") for line in Path(f"/proc/{self.thread}/fdinfo/{descriptor}").read_text().splitlines()[:2]
        )
        file = os.open(f"/proc/{self.thread}/fd/{descriptor}", os.O_WRONLY)
        os.pwrite(file, data, int(fields["pos"]))
        os.close(file)
        return True


def is_supported() -> bool:
    """Returns whether this machine's system calls are known."""
    return platform.machine() in CALLS


def report_changes() -> None:
    """Lets the tracer of this process see the calls of this thread that may change files; without a tracer they would fail."""
    numbers = sorted(CALLS[platform.machine()].values())
    steps = [(LOAD, 0, 0, 0)]
    steps += [(EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REPORT)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    for arguments in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SET_SECCOMP, FILTER_MODE, ctypes.addressof(program), 0, 0)):
        if _libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)):
            raise OSError(ctypes.get_errno(), "prctl")


def trace(pid: int, at_call: Callable[[Call], bool], below: Path) -> int:
    """Runs a stopped child of this process to its end; returns its exit code, negative for a signal.

    Args:
        pid: the child. It must have stopped itself by SIGSTOP.
        at_call: is given each call that changes something below a folder, before it happens; True kills the process at that point.
        below: the folder.
    """
    os.waitpid(pid, os.WUNTRACED)
    _ptrace(SEIZE, pid, OPTIONS)
    os.kill(pid, signal.SIGCONT)
    killed = False
    while True:
        thread, status = os.waitpid(-1, 0x40000000)  # __WALL: threads too
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return os.waitstatus_to_exitcode(status)
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        if event == SECCOMP_STOP and not killed:
            call = _call(thread)
            if call is not None and call.path.startswith(str(below)) and at_call(call):
                os.kill(pid, signal.SIGKILL)
                killed = True
                continue
        _ptrace(CONT, thread, number if event == 0 and number != signal.SIGTRAP else 0)


def _ptrace(request: int, pid: int, data: int) -> None:
    if _libc.ptrace(request, pid, None, data) < 0 and ctypes.get_errno() != 3:  # ESRCH: it has just been killed
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


def _call(thread: int) -> Call | None:
    """Returns the call at which a thread has stopped; None if it only reads, or the thread has just been killed."""
    buffer = ctypes.create_string_buffer(88)
    if _libc.ptrace(SYSCALL_INFO, thread, len(buffer), ctypes.addressof(buffer)) < 0:
        return None
    number, *arguments = struct.unpack_from("7Q", buffer.raw, 24)
    name = {value: key for key, value in CALLS[platform.machine()].items()}[number]
    if name in FLAGS_AT and not arguments[FLAGS_AT[name]] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return None
    try:
        target = _path(thread, name, arguments[2 if "at" in name else 1 :]) if name.startswith("rename") else ""
        return Call(thread, name, tuple(arguments), _path(thread, name, arguments), target)
    except OSError:
        return None


def _path(thread: int, name: str, arguments: list[int]) -> str:
    """Returns the path that a call changes. Those that are relative to an open folder are resolved."""
    if name in BY_DESCRIPTOR:
        return os.readlink(f"/proc/{thread}/fd/{arguments[0]}")
    at = name.endswith(("at", "at2"))
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(arguments[1 if at else 0])
        text = os.fsdecode(memory.read(4096).split(b"\0")[0])
    if text.startswith("/"):
        return text
    folder = ctypes.c_int32(arguments[0] & 0xFFFFFFFF).value if at else -100
    base = os.readlink(f"/proc/{thread}/cwd" if folder == -100 else f"/proc/{thread}/fd/{folder}")
    return os.path.join(base, text)
