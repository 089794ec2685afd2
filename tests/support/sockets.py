"""The TCP sockets on which processes accept connections, from /proc."""

import os
from pathlib import Path

LISTENS = "0A"  # a socket's state, as the kernel shows it
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listeners(pids: list[int]) -> set[str]:
    """Returns the addresses on which processes listen, ADDRESS:PORT in the kernel's hexadecimal."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:  # it has been closed, or the process has ended
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == LISTENS and inode in inodes:
                found.add(local)
    return found


def beyond_loopback(addresses: set[str]) -> set[str]:
    """Returns those of the addresses that other machines can reach."""
    return {address for address in addresses if not address.startswith(LOOPBACK)}
