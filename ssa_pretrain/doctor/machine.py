"""The doctor's checks of one machine without a GPU: versions, memory, limits, shared memory, clock, stale locks of compilers, ports. Stdlib only.

Each check is a function without arguments that returns findings. Not done here: whether the network between nodes is fast.
"""

import ctypes
import os
import platform
import resource
import socket
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ssa_pretrain.doctor.findings import Finding, fail, ok, warn

DISTRIBUTION = "ssa-pretrain"
SHOWN = ("torch", "megatron-core", "triton", "transformer-engine", "deepspeed")
NEEDED = ("torch", "megatron-core")
GIB = 2**30
STALE_SECONDS = 600.0  # of a lock: no operator takes that long to compile
MAX_LISTED_FILES = 200_000
SHARED_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.juicefs", "wekafs")
LEAST_FILES, LEAST_PROCESSES = 4096, 4096
LEAST_SHM = 1 * GIB
PORTS = (29400, 29500)  # torchrun's rendezvous, DeepSpeed's master


def python_and_packages() -> list[Finding]:
    """The interpreter and the libraries, against the ranges that this project declares."""
    found = []
    wanted = _requirements()
    for name in SHOWN:
        range_ = wanted.get(name, "")
        try:
            have = version(name)
        except PackageNotFoundError:
            if name in NEEDED:
                found.append(fail(name, "is not installed", f"pip install '{name}{range_}'"))
            continue
        if range_ and not Requirement(name + range_).specifier.contains(have.split("+")[0], prereleases=True):
            found.append(fail(name, f"{have}; {range_} is supported", f"pip install '{name}{range_}'"))
        else:
            found.append(ok(name, have))
    return [_python(), *found]


def _python() -> Finding:
    have = platform.python_version()
    if not (3, 11) <= tuple(int(n) for n in platform.python_version_tuple()[:2]) < (3, 14):
        return fail("python", f"{have}; 3.11, 3.12 and 3.13 are supported", "make PYTHON=/path/to/python3.12")
    return ok("python", f"{have}, {platform.platform(terse=True)}")


def _requirements() -> dict[str, str]:
    """Returns the declared range of each package for this Python, such as ">=2.11,<2.14"; those of extras too."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout on the path, not installed
        return {}
    parsed = [Requirement(line) for line in lines]
    extras = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    here = [
        one
        for one in parsed
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
    return {one.name: str(one.specifier) for one in here if str(one.specifier)}


def memory() -> list[Finding]:
    """Main memory, and the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(
        (
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if "MemAvailable" in line
        ),
        total,
    )
    limit = _read("/sys/fs/cgroup/memory.max")
    limited = f", the container may use {int(limit) / GIB:.0f} GiB" if limit.isdigit() else ""
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free, {os.cpu_count()} cores{limited}"
    if available < 2 * GIB:
        return [warn("memory", text, "end other programs: a rank needs about 2 GiB on the host")]
    return [ok("memory", text)]


def shared_memory() -> list[Finding]:
    """The size of /dev/shm, through which NCCL and workers exchange data; Docker gives 64 MiB."""
    if not os.path.isdir("/dev/shm"):
        return [warn("/dev/shm", "is missing", "mount a tmpfs there: NCCL and gloo use it")]
    state = os.statvfs("/dev/shm")
    size, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
    text = f"{free / GIB:.2f} of {size / GIB:.2f} GiB free"
    if free < LEAST_SHM:
        return [
            warn("/dev/shm", text, "docker run --ipc=host, or --shm-size=16g; Kubernetes: an emptyDir of medium Memory")
        ]
    return [ok("/dev/shm", text)]


def limits() -> list[Finding]:
    """Limits of this user's processes (ulimit)."""
    found = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        found.append(warn("ulimit -n", f"{files} open files", "ulimit -n 65536; many ranks and shards need more"))
    if processes != resource.RLIM_INFINITY and processes < LEAST_PROCESSES:
        found.append(warn("ulimit -u", f"{processes} processes and threads", "ulimit -u 65536"))
    if size != resource.RLIM_INFINITY:
        text = f"files of at most {size / GIB:.2f} GiB"
        found.append(fail("ulimit -f", text, "ulimit -f unlimited: a checkpoint's files are larger"))
    if locked != resource.RLIM_INFINITY and os.path.isdir("/sys/class/infiniband"):
        remedy = "ulimit -l unlimited, or docker run --ulimit memlock=-1: InfiniBand needs pinned memory"
        found.append(warn("ulimit -l", f"{locked // 1024} KiB of pinned memory", remedy))
    return found or [ok("ulimit", f"{_count(files)} open files, {_count(processes)} processes, files of any size")]


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


class _Timex(ctypes.Structure):
    """The head of the kernel's struct timex."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock() -> list[Finding]:
    """Whether a time service keeps the clock. Runs measure with the monotonic clock; only times in logs and certificates depend on it."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    state = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) < 0:
        return [ok("clock", f"{now}; the kernel does not tell whether a time service keeps it")]
    if state.status & 0x40:
        return [warn("clock", f"{now}, kept by no time service", "start chrony or systemd-timesyncd")]
    return [ok("clock", f"{now}, error below {state.maxerror / 1e6:.2g} s")]


def compiler_caches() -> list[Finding]:
    """Locks that a killed build has left (torch waits for them for ever, without a word), empty files, and caches on shared storage."""
    found: list[Finding] = []
    home = Path.home()
    folders = {
        "torch_extensions": [
            Path(os.environ.get("TORCH_EXTENSIONS_DIR", home / ".cache" / "torch_extensions")),
            home / ".cache" / "ssa_pretrain" / "torch_extensions",
        ],
        "triton cache": [Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))],
    }
    for name, places in folders.items():
        kept = [place for place in dict.fromkeys(places) if place.is_dir()]
        files = [file for place in kept for file in _files(place)]
        problems = [*_stale_locks(name, files), *_empty_files(name, files)]
        problems += [
            warn(
                name, f"{place} is on shared storage ({kind})", "point it at a local disk: nodes compile the same there"
            )
            for place in kept
            if (kind := file_system(place)) in SHARED_SYSTEMS
        ]
        found += problems or [ok(name, f"{len(files)} files, no stale lock" if kept else "not used yet")]
    return found


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, _, names in os.walk(folder):
        found += [Path(place, name) for name in names]
        if len(found) > MAX_LISTED_FILES:
            break
    return found


def _stale_locks(name: str, files: list[Path]) -> Iterator[Finding]:
    for path in files:
        if path.name != "lock":
            continue
        age = time.time() - path.stat().st_mtime
        if age > STALE_SECONDS:
            yield fail(name, f"a lock of {age / 60:.0f} minutes ago, and builds wait for it: {path}", f"rm {path}")
        else:
            yield warn(name, f"a build holds a lock since {age:.0f} s: {path}", f"if none is running: rm {path}")


def _empty_files(name: str, files: list[Path]) -> Iterator[Finding]:
    built = {".so", ".o", ".cubin", ".json", ".ptx", ".ttir", ".llir"}
    empty = [path for path in files if path.suffix in built and path.stat().st_size == 0]
    if empty:
        yield fail(
            name, f"{len(empty)} empty files of an unfinished build, such as {empty[0]}", f"rm -r {empty[0].parent}"
        )


def file_system(path: Path) -> str:
    """Returns the type of the file system that a path lies on, such as "ext4" or "nfs4"; empty if unknown."""
    best, kind = "", ""
    place = str(path.absolute())
    for line in _read("/proc/mounts").splitlines():
        _, mount, this, *_ = line.split()
        if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, this
    return kind


def network() -> list[Finding]:
    """This host's name, its address, and the ports where ranks meet by default."""
    found = []
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        remedy = f"add the line '127.0.0.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return [fail("hostname", f"{host} has no address: {error}", remedy)]
    if address.startswith("127."):
        found.append(ok("hostname", f"{host} is {address}: for several nodes give the address of another interface"))
    else:
        found.append(ok("hostname", f"{host} is {address}"))
    busy = [port for port in PORTS if not _is_free(port)]
    if busy:
        text = f"{', '.join(map(str, busy))} in use"
        remedy = "on several nodes choose others: --rdzv-endpoint HOST:PORT, --master-port PORT"
        return [*found, warn("ports", text, remedy)]
    return [*found, ok("ports", f"{' and '.join(map(str, PORTS))} are free")]


def _is_free(port: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
