"""The jobs of launchers/torchrun.sh and launchers/deepspeed.sh: checks flags, environment variables, hostfile and ports, and builds the command.

A flag takes precedence over the variable of its name. A problem raises `LaunchError` with one sentence. Stdlib only: GPUs that only torch or
DeepSpeed can count are counted in a separate process. DeepSpeed's `fetch_hostfile` and `parse_resource_filter` are not used, because they
import torch, which takes seconds, and answer a bad line with a trace. The rules here are the same.
"""

import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import randrange

from ssa_pretrain.errors import LaunchError

TRAIN = "ssa_pretrain.train"
POSITIVE = re.compile(r"[1-9][0-9]*")
DEFAULT_PORT = 29500
MAX_RESTARTS, RESTART_WAIT = 3, 5  # defaults; only training resumes, so other entry points do not restart by default
COMMON_FLAGS = ("python", "module", "max-restarts", "restart-wait")
TORCHRUN_FLAGS = ("nproc-per-node", "nnodes", "rdzv-endpoint", "rdzv-id", *COMMON_FLAGS)
DEEPSPEED_FLAGS = ("num-gpus", "num-nodes", "hostfile", "include", "exclude", "master-port", *COMMON_FLAGS)


@dataclass(frozen=True, slots=True)
class Job:
    """The command that a launcher starts.

    Attributes:
        command: the command as it could be given by hand.
        executed: the command that runs in its place.
        module, arguments: the entry point of the ranks.
        world_size: the number of processes; None if it cannot be counted here.
        uncounted: why it cannot be counted, and the remedy.
        is_remote: whether DeepSpeed's launcher starts the ranks by ssh, so that they are not children of this process.
        max_restarts: how often in a row the run is started again after a fault.
        restart_wait: seconds before the first of these.
    """

    command: list[str]
    executed: list[str]
    module: str
    arguments: list[str]
    world_size: int | None
    uncounted: str
    is_remote: bool = False
    max_restarts: int = 0
    restart_wait: int = RESTART_WAIT


@dataclass(slots=True)
class Flags:
    """The flags of a launcher, and the arguments after them."""

    values: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    rest: list[str] = field(default_factory=list)


def read_flags(words: Sequence[str], names: Sequence[str]) -> Flags:
    """Returns the flags before the entry point's arguments; `--flag value`, `--flag=value` and underscores are the same."""
    found, words = Flags(), list(words)
    while words and words[0].startswith("--"):
        word = words.pop(0)
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--dry-run":
            if equals:
                raise LaunchError(f"--dry-run takes no value; leave out ={value}")
            found.dry_run = True
        elif flag[2:] in names:
            value = value if equals else words.pop(0) if words else ""
            if not value:
                raise LaunchError(f"{flag} needs a value; see --help")
            found.values[flag[2:]] = value
        else:
            raise LaunchError(f"{word} is not a flag; put flags of the entry point after --")
    found.rest = words
    return found


def require(pattern: re.Pattern[str], flag: str, value: str, rule: str, advice: str) -> None:
    """Raises LaunchError unless the whole value matches."""
    if not pattern.fullmatch(value):
        raise LaunchError(f"--{flag}={value} must be {rule}; {advice}")


def number(flags: Flags, environment: Mapping[str, str], flag: str, default: int) -> int:
    """Returns the whole number of a flag, else of the variable of its name, else the default."""
    value = flags.values.get(flag) or environment.get(flag.upper().replace("-", "_")) or str(default)
    require(re.compile(r"[0-9]{1,6}"), flag, value, "a whole number, at least 0", f"try {default}")
    return int(value)


def require_package(module: str) -> None:
    """Raises LaunchError if this interpreter does not have the package of the entry point."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise LaunchError(f"--python={sys.executable} has no package {package}, which --module={module} names")


def torchrun_job(words: Sequence[str], environment: Mapping[str, str]) -> tuple[Job, bool]:
    """Returns the job of launchers/torchrun.sh, and whether this is a dry run."""
    flags = read_flags(words, TORCHRUN_FLAGS)

    def given(name: str, default: str) -> str:
        return flags.values.get(name) or environment.get(name.upper().replace("-", "_")) or default

    nnodes, nproc, module = given("nnodes", "1"), given("nproc-per-node", "auto"), flags.values.get("module", TRAIN)
    require(POSITIVE, "nnodes", nnodes, "a positive number", "try 1")
    require(re.compile(r"[1-9][0-9]*|auto|gpu"), "nproc-per-node", nproc, "a positive number, gpu or auto", "try 8")
    meet = ["--standalone"]
    if int(nnodes) > 1:
        endpoint = given("rdzv-endpoint", "")
        if not endpoint:
            advice = "the same on every node; try the first node's name and port 29400"
            raise LaunchError(f"--nnodes={nnodes} needs --rdzv-endpoint=HOST:PORT, {advice}")
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={given('rdzv-id', 'ssa_pretrain')}"]
    require_package(module)
    per_node = int(nproc) if nproc.isdecimal() else count_torch(nproc)
    arguments = [f"--nnodes={nnodes}", f"--nproc-per-node={nproc}", *meet, "-m", module, *flags.rest]
    job = Job(
        command=[sys.executable, "-m", "torch.distributed.run", *arguments],
        executed=[sys.executable, "-m", "ssa_pretrain.launch.torch_agent", *arguments],
        module=module,
        arguments=flags.rest,
        world_size=int(nnodes) * per_node if per_node else None,
        uncounted="the GPUs of a node cannot be counted here; --nproc-per-node=N gives their number",
        max_restarts=number(flags, environment, "max-restarts", MAX_RESTARTS if module == TRAIN else 0),
        restart_wait=number(flags, environment, "restart-wait", RESTART_WAIT),
    )
    return job, flags.dry_run


def count_torch(nproc: str) -> int | None:
    """Returns how many processes torchrun would start on this node for `auto` or `gpu`; None if it cannot tell."""
    code = "from torch.distributed.run import determine_local_world_size as count"
    return _counted(f"{code}; print(count({nproc!r}))")


def count_deepspeed() -> int | None:
    """Returns how many GPUs DeepSpeed counts on this node; None if it cannot tell."""
    return _counted("from deepspeed.accelerator import get_accelerator as found; print(found().device_count())")


def _counted(code: str) -> int | None:
    """Returns the number that Python code prints last. It runs in a separate process, because it imports torch."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stdout.split()[-1:] if done.returncode == 0 else []
    return int(last[0]) if last and POSITIVE.fullmatch(last[0]) else None


def deepspeed_job(words: Sequence[str], environment: Mapping[str, str]) -> tuple[Job, bool]:
    """Returns the job of launchers/deepspeed.sh, and whether this is a dry run."""
    flags = read_flags(words, DEEPSPEED_FLAGS)
    given = {
        name: environment.get(name.upper().replace("-", "_"), "") for name in ("num-gpus", "num-nodes", "hostfile")
    }
    given |= flags.values
    hostfile, module = given["hostfile"], given.get("module", TRAIN)
    check_deepspeed_flags(given)
    hosts = read_hostfile(Path(hostfile)) if hostfile else {}
    if int(given["num-nodes"] or 1) > len(hosts) and hostfile:
        raise LaunchError(
            f"--num-nodes={given['num-nodes']} is more than the hosts of --hostfile={hostfile}; try {len(hosts)}"
        )
    port = master_port(given.get("master-port", ""), environment.get("MASTER_PORT", ""), on_one_node=not hostfile)
    require_package(module)
    if not hostfile and (count := int(given["num-gpus"] or 0) or count_deepspeed()):
        hosts = {"localhost": count}
    counts = count_slots(hosts, given)
    options = {name: given.get(name, "") for name in ("num-nodes", "num-gpus", "include", "exclude")}
    options["master-port"] = port
    # Without a hostfile the command names one that does not exist, which means this node; by default DeepSpeed reads /job/hostfile.
    launcher = [f"--hostfile={hostfile or '/nonexistent'}"]
    launcher += [f"--{name.replace('-', '_')}={value}" for name, value in options.items() if value]
    entry = ["--module", module, "engine=deepspeed", *flags.rest]
    remedy = "--hostfile=PATH" if options["include"] or options["exclude"] else "--num-gpus=N"
    job = Job(
        command=[sys.executable, "-m", "deepspeed.launcher.runner", *launcher, *entry],
        executed=[
            sys.executable,
            "-m",
            "ssa_pretrain.launch.deepspeed_agent",
            *launcher,
            "--log_level=critical",
            *entry,
        ],
        module=module,
        arguments=["engine=deepspeed", *flags.rest],
        world_size=sum(counts.values()) or None,
        uncounted=f"the GPUs of this node cannot be counted here; {remedy} gives their number",
        is_remote=sum(count > 0 for count in counts.values()) > 1,
        max_restarts=number(flags, environment, "max-restarts", MAX_RESTARTS if module == TRAIN else 0),
        restart_wait=number(flags, environment, "restart-wait", RESTART_WAIT),
    )
    return job, flags.dry_run


def check_deepspeed_flags(given: Mapping[str, str]) -> None:
    """Raises LaunchError if flags of launchers/deepspeed.sh are wrong or contradict each other."""
    hostfile, num_gpus, num_nodes = given["hostfile"], given["num-gpus"], given["num-nodes"]
    has_include, has_exclude = "include" in given, "exclude" in given
    require(POSITIVE, "num-gpus", num_gpus or "1", "a positive number", "try 8")
    require(POSITIVE, "num-nodes", num_nodes or "1", "a positive number", "try 2")
    if hostfile and not Path(hostfile).is_file():
        raise LaunchError(f"--hostfile={hostfile} does not exist; it has a line such as 'node0 slots=8' for each node")
    if not hostfile and int(num_nodes or 1) > 1:
        raise LaunchError(
            f"--num-nodes={num_nodes} needs --hostfile, with a line such as 'node0 slots=8' for each node"
        )
    if (has_include or has_exclude) and (num_gpus or num_nodes):
        raise LaunchError("--include and --exclude name the GPUs; leave out --num-gpus and --num-nodes")
    if has_include and has_exclude:
        raise LaunchError("--include and --exclude cannot both be given; name with --include what is left")


def count_slots(hosts: Mapping[str, int], given: Mapping[str, str]) -> dict[str, int]:
    """Returns how many processes each host gets under the flags of launchers/deepspeed.sh; raises LaunchError if none gets any."""
    include, exclude = given.get("include", ""), given.get("exclude", "")
    used = list(hosts.items())[: int(given["num-nodes"] or len(hosts) or 1)]
    counts = {host: num_remaining(host, int(given["num-gpus"] or slots), include, exclude) for host, slots in used}
    if hosts and not sum(counts.values()):
        flag = f"--include={include}" if include else f"--exclude={exclude}"
        raise LaunchError(f"{flag} leaves no GPU of {' '.join(hosts)}; write HOST:GPU,GPU@HOST")
    return counts


def read_hostfile(path: Path) -> dict[str, int]:
    """Returns the slots of each host of a DeepSpeed hostfile, in order."""
    hosts: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        host, *rest = line.split()
        slots = rest[0].removeprefix("slots=") if rest and rest[0].startswith("slots=") else ""
        if not POSITIVE.fullmatch(slots):
            shown = " ".join([host, *rest])
            raise LaunchError(
                f"--hostfile={path} has a line '{shown}', which must be HOST slots=GPUS; try '{host} slots=8'"
            )
        if host in hosts:
            raise LaunchError(f"--hostfile={path} has {host} twice; leave one line of it, with all its slots")
        hosts[host] = int(slots)
    if not hosts:
        raise LaunchError(f"--hostfile={path} names no host; write a line such as 'node0 slots=8' for each node")
    return hosts


def num_remaining(host: str, slots: int, include: str, exclude: str) -> int:
    """Returns how many of a host's GPUs, 0 to slots - 1, remain after --include or --exclude, such as node1:0,2@node2."""
    if include:
        return num_listed(host, slots, include)
    return slots - num_listed(host, slots, exclude) if exclude else slots


def num_listed(host: str, slots: int, listed: str) -> int:
    """Returns how many of a host's GPUs a list names; a host without GPUs stands for all of them."""
    specs = [spec.partition(":") for spec in listed.split("@")]
    gpus = {gpu for name, colon, some in specs if name == host and colon for gpu in some.split(",")}
    whole = any(name == host and not colon for name, colon, _ in specs)
    return sum(str(gpu) in gpus for gpu in range(slots)) if gpus else slots * whole


def master_port(flag: str, variable: str, *, on_one_node: bool) -> str:
    """Returns the port where the ranks meet: the given one, else a free one on one node, else the default."""
    shown, remedy = f"--master-port={flag}", "leave it out for a free one"
    if variable and not flag:
        shown, remedy = f"MASTER_PORT={variable} in the environment", "unset it for a free port, or give --master-port"
    port = flag or variable
    if not port:
        return str(free_port() if on_one_node else DEFAULT_PORT)
    if not (POSITIVE.fullmatch(port) and int(port) <= 65535):
        raise LaunchError(f"{shown} must be a port, 1 to 65535; try {DEFAULT_PORT}")
    if on_one_node and not is_free(int(port)):
        raise LaunchError(f"{shown} is in use by another process of this node; {remedy}")
    return port


def free_port() -> int:
    """Returns an unused port below the range that the system assigns to connections, because a rank takes it only seconds later."""
    while not is_free(port := randrange(15_000, 30_000)):
        pass
    return port


def is_free(port: int) -> bool:
    """Returns whether a process of this node can listen on a port, on every address like the ranks' store."""
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError:
        return False
    return True
