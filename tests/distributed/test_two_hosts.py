"""Two hosts meet by the rendered commands: two network namespaces where this user may make them, else two launchers on the loopback.

Each host runs the script of target=torchrun with one process. The sum of ranks shows that both are one group, over both hosts.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssa_pretrain.launch.render.command import answer
from support.processes import ON_GPUS, ROOT, free_port

WHO = """\
import os, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"])])
dist.all_reduce(total)
note = f"{os.environ['HOST']} {os.environ['WORLD_SIZE']} {os.environ['GREETING']} {total.item():.0f}"
pathlib.Path(os.environ["OUT"], os.environ["RANK"]).write_text(note)
dist.destroy_process_group()
"""


ETC = Path("/etc/netns")  # `ip netns exec NAME` shows the files of /etc/netns/NAME as those of /etc


def ip(words: str) -> bool:
    """Returns whether a command of iproute2 worked."""
    try:
        return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@dataclass(frozen=True)
class Host:
    """A host: what a command on it begins with, its name and its network interface."""

    prefix: list[str]
    name: str
    interface: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Yields two hosts. A network namespace has its own addresses, its own /etc/hosts (below /etc/netns) and, by unshare, its own host name."""
    names = [f"ssa{os.getpid()}{side}" for side in "ab"]
    made = [ip(f"netns add {name}") for name in names]
    linked = all(made) and ip(f"link add v0 netns {names[0]} type veth peer name v0 netns {names[1]}")
    try:
        if not linked:
            yield [Host([], "127.0.0.1", "lo"), Host([], "localhost", "lo")]
            return
        lines = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(names, start=1))
        for number, name in enumerate(names, start=1):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
            assert ip(f"-n {name} addr add 10.77.0.{number}/24 dev v0")
            assert ip(f"-n {name} link set v0 up") and ip(f"-n {name} link set lo up")
        within = ["unshare", "--uts", "bash", "-c", 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"']
        yield [Host(["ip", "netns", "exec", name, *within, name], name, "v0") for name in names]
    finally:
        for name in names:
            ip(f"netns del {name}")
            shutil.rmtree(ETC / name, ignore_errors=True)


@pytest.mark.skipif(ON_GPUS, reason="computes nothing")
def test_two_hosts_become_one_group(tmp_path: Path, hosts: list[Host]) -> None:
    (tmp_path / "who.py").write_text(WHO)
    spec = [f"spec={ROOT}/launchers/spec.yaml", "image=", "secrets=[]", "nodes=2", "gpus_per_node=1", "module=who"]
    spec += [
        f"hosts=[{', '.join(host.name for host in hosts)}]",
        f"directory={ROOT}",
        f"python={sys.executable}",
        f"port={free_port()}",
    ]
    spec += [f"environment={{GLOO_SOCKET_IFNAME: {hosts[0].interface}, GREETING: 'a b'}}", "overrides=[]"]
    script = tmp_path / "run.sh"
    script.write_text(answer(["target=torchrun", *spec]))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path)}
    started = []
    for number, host in enumerate(hosts):
        command = [*host.prefix, "bash", str(script)]
        started.append(subprocess.Popen(command, env=kept | {"HOST": str(number)}, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join([shlex.join(spec), *errors])
    notes = [(tmp_path / str(rank)).read_text().split(" ", 1) for rank in range(2)]
    assert {note for _, note in notes} == {"2 a b 1"}
    assert sorted(host for host, _ in notes) == ["0", "1"]
