"""The ranks' store listens on the address under which they meet, and nowhere else."""

import errno
import os
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from ssa_pretrain.parallel import store
from ssa_pretrain.parallel.store import hosted_store, is_loopback, keep_on_loopback, listening_socket

LIMIT = timedelta(seconds=20)


def own_address() -> str:
    """Returns this machine's address on its default route; skips the test without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return probe.getsockname()[0]


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_store_on_the_loopback_serves_ranks_and_nobody_else(host):
    hosted = hosted_store(host, 0, timeout=LIMIT)
    client = TCPStore(host, hosted.port, is_master=False, timeout=LIMIT)
    client.set("key", "value")
    assert hosted.get("key") == b"value"
    assert not answers(own_address(), hosted.port)
    everywhere = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert answers(own_address(), everywhere.port), "torch's own store listens on every interface no more"


def test_store_on_a_named_interface_is_not_on_the_loopback():
    """Another process may listen on the loopback at one of the ports, so there are three."""
    address = own_address()
    hosted = [hosted_store(address, 0, timeout=LIMIT) for _ in range(3)]
    assert all(answers(address, store.port) for store in hosted)
    assert not all(answers("127.0.0.1", store.port) for store in hosted)


def test_port_in_use_is_an_error():
    with listening_socket("127.0.0.1", 0) as first, pytest.raises(OSError) as caught:
        listening_socket("127.0.0.1", first.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


def test_address_that_is_not_here_is_left_to_torch():
    assert listening_socket("192.0.2.1", 0) is None


def test_name_that_is_the_loopback_only_here_is_left_to_torch(monkeypatch):
    """As Debian's /etc/hosts has it for the machine's own name; other nodes know the name by another address."""
    monkeypatch.setattr(store.socket, "getaddrinfo", lambda *_: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))])
    assert listening_socket("node0", 0) is None


def test_name_of_several_addresses_is_left_to_torch(monkeypatch):
    found = {socket.AF_INET6: ("::1", 0, 0, 0), socket.AF_INET: ("127.0.0.1", 0)}
    monkeypatch.setattr(store.socket, "getaddrinfo", lambda host, port, family, *_: [(family, 1, 6, "", found[family])])
    assert listening_socket("node0", 0) is None
    with listening_socket("localhost", 0) as opened:
        assert opened.family == socket.AF_INET6


def test_loopback_by_name_and_number():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.0.1.1", "::1"))
    assert not any(is_loopback(host) for host in ("node0", "10.0.0.1", "fe80::1%eth0", ""))


def test_interface_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    keep_on_loopback()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "lo")
