"""The ranks' store listens on one interface: that of the address under which the ranks meet, the loopback on one node.

Ranks find each other through torch's TCPStore. By itself it listens on every interface of its node and gives and takes keys without asking who is
there; and what ranks then exchange as objects is unpickled. So the listening socket is opened here, on the address itself, and handed to the store. If
the ranks meet on the loopback, gloo and NCCL are told to use it too.

Not here: encryption, and who may connect on the chosen interface. Between nodes, the network itself must be closed to others (SECURITY.md).
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

BACKLOG = 2048
LOOPBACK = Path("/sys/class/net/lo")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def hosted_store(host: str, port: int, *, world_size: int | None = None, timeout: timedelta | None = None) -> TCPStore:
    """Returns a store that this process hosts, listening only on the address of `host`.

    It listens on every interface, as torch's own, where other nodes may know the name by another address than this one does: if it stands for several
    addresses, for none of this node (a service in front of it), or for the loopback although it is not called so.

    Args:
        host: the address or name under which the ranks meet.
        port: 0 for a free one.
        world_size: ranks of the store; None if it is not fixed.
        timeout: of its operations; None: torch's.

    Raises:
        OSError: EADDRINUSE, if another process has the port.
    """
    settings = {"world_size": world_size, "is_master": True, "multi_tenant": True, "wait_for_workers": False}
    if timeout is not None:
        settings["timeout"] = timeout
    listening = listening_socket(host, port)
    if listening is None:
        return TCPStore(host, port, **settings)
    bound, port = listening.getsockname()[:2]
    return TCPStore(bound, port, master_listen_fd=listening.detach(), **settings)


def listening_socket(host: str, port: int) -> socket.socket | None:
    """Returns a socket that listens on the address of a host, None if it has no address here that every rank must know.

    Of the loopback's two, IPv6 comes first, as in the clients of torch's store.
    """
    addresses = list(dict.fromkeys(_addresses(host)))
    if not is_loopback(host) and (len(addresses) != 1 or _is_loopback(addresses[0][1])):
        return None
    for family, address in addresses:
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((address, port))
        except OSError as error:
            opened.close()
            if error.errno == errno.EADDRINUSE:
                raise
            continue
        opened.listen(BACKLOG)
        return opened
    return None


def is_loopback(host: str) -> bool:
    """Returns whether a host is the loopback by name or number, so that all ranks are on this node."""
    return host == "localhost" or _is_loopback(host)


def keep_on_loopback() -> None:
    """Makes gloo and NCCL listen on the loopback, unless the user has named an interface; call it before a process group exists."""
    if LOOPBACK.exists():
        for name in INTERFACE_VARIABLES:
            os.environ.setdefault(name, LOOPBACK.name)


def _addresses(host: str) -> Iterator[tuple[socket.AddressFamily, str]]:
    for family in (socket.AF_INET6, socket.AF_INET):
        with suppress(socket.gaierror):
            for found in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM):
                yield family, str(found[4][0])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
