"""Two hosts meet by the rendered commands: two network namespaces where this user may make them, else two launchers on the loopback.

Each host runs the script of target=torchrun with two processes. Rank and sum of ranks show that all four are one group, over both hosts.
"""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssa_pretrain.launch.render.command import answer
from support.processes import ROOT

WHO = """\
import os, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"])])
dist.all_reduce(total)
note = f"{os.environ['HOST']} {os.environ['WORLD_SIZE']} {os.environ['GREETING']} {total.item():.0f}"
pathlib.Path(os.environ["OUT"], os.environ["RANK"]).write_text(note)
dist.destroy_process_group()
"""


def ip(words: str) -> bool:
    """Returns whether a command of iproute2 worked."""
    try:
        return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], str, str]]]:
    """Yields (what a command on this host begins with, its address, its network interface)."""
    names = [f"ssa{os.getpid()}{side}" for side in "ab"]
    made = [ip(f"netns add {name}") for name in names]
    linked = all(made) and ip(f"link add v0 netns {names[0]} type veth peer name v0 netns {names[1]}")
    try:
        if not linked:
            yield [([], "127.0.0.1", "lo")] * 2
            return
        for number, name in enumerate(names, start=1):
            assert ip(f"-n {name} addr add 10.77.0.{number}/24 dev v0")
            assert ip(f"-n {name} link set v0 up") and ip(f"-n {name} link set lo up")
        yield [(["ip", "netns", "exec", name], f"10.77.0.{n}", "v0") for n, name in enumerate(names, start=1)]
    finally:
        for name in names:
            ip(f"netns del {name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_hosts_become_one_group(tmp_path: Path, hosts: list[tuple[list[str], str, str]]) -> None:
    (tmp_path / "who.py").write_text(WHO)
    (prefix, first, interface), (_, second, _) = hosts
    names = [first, second] if prefix else [first, "localhost"]
    spec = [f"spec={ROOT}/launchers/spec.yaml", "image=", "secrets=[]", "nodes=2", "gpus_per_node=2", "module=who"]
    spec += [f"hosts=[{', '.join(names)}]", f"directory={ROOT}", f"python={sys.executable}", f"port={free_port()}"]
    spec += [f"environment={{GLOO_SOCKET_IFNAME: {interface}, GREETING: 'a b'}}", "overrides=[]"]
    script = tmp_path / "run.sh"
    script.write_text(answer(["target=torchrun", *spec]))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path)}
    started = []
    for number, (words, _, _) in enumerate(hosts):
        command = [*words, "bash", str(script)]
        started.append(subprocess.Popen(command, env=kept | {"HOST": str(number)}, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join([shlex.join(spec), *errors])
    notes = [(tmp_path / str(rank)).read_text().split(" ", 1) for rank in range(4)]
    assert {note for _, note in notes} == {"4 a b 6"}
    assert sorted(host for host, _ in notes) == ["0", "0", "1", "1"]
