"""torchrun under our launcher: the same arguments, without its report of 40 lines after the sentence of a rank.

It sends its signals to the launcher, which passes them on to the ranks. torch would kill the ranks after half a minute, and leave them
behind on a second signal. It hosts the stores through which the ranks meet, on one interface (parallel/store.py). It writes the exit codes of the ranks, or why the nodes did not meet, into the launcher's folder (supervision.py).
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from ssa_pretrain.launch.supervision import AGENT, FAILURES
from ssa_pretrain.process import LAUNCH, exit_when_launcher_ends
from ssa_pretrain.signals import STOP_SIGNALS, on_signals

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 10.0  # for another node to answer at the meeting point


def main() -> int:
    """Runs torchrun with the command line's arguments; returns 1 if a rank failed or the nodes did not meet."""
    folder, launcher = Path(os.environ[LAUNCH]), os.getppid()
    exit_when_launcher_ends(folder)
    with on_signals(lambda number: os.kill(launcher, signal.SIGTERM), STOP_SIGNALS):
        logging.disable(logging.ERROR)  # torch's messages on each signal and exit code
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.run import parse_args, run

        arguments = parse_args(["--signals-to-handle=SIGUSR2", *sys.argv[1:]])
        try:
            require_meeting_point(arguments.rdzv_endpoint)
            hosted = host_meeting_point(arguments)
            run(arguments)
            del hosted
        except ChildFailedError as error:
            codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
            (folder / FAILURES).write_text(json.dumps(codes))
            return 1
        except RendezvousError as error:
            (folder / AGENT).write_text(rendezvous_failure(arguments.rdzv_endpoint, arguments.nnodes, error))
            return 1
    return 0


def require_meeting_point(endpoint: str) -> None:
    """Raises RendezvousConnectionError if another program answers at the endpoint; torch would retry for minutes, with a trace each time."""
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    if not endpoint:
        return
    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return  # no node is there yet
    answered = threading.Event()

    def ask() -> None:
        with suppress(DistError, RuntimeError):
            TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_SECONDS))
            answered.set()

    # A thread, because the store's own timeout does not end its wait for a first answer.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not answered.is_set():
        raise RendezvousConnectionError(f"{endpoint} does not answer")


def host_meeting_point(arguments: Any) -> Any:
    """Hosts the store of torchrun's rendezvous if this node is the endpoint, and lets torchrun host the ranks' store in the same way.

    Args:
        arguments: torchrun's, changed in place: a single node meets on the loopback, and torchrun itself hosts no rendezvous.

    Returns:
        What keeps the store open; None if another process hosts it.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

    from ssa_pretrain.parallel.store import hosted_store

    class OnOneInterface(dynamic_rendezvous.DynamicRendezvousHandler):
        def _create_tcp_store_server(self, master_addr: str, master_port: int) -> Any:
            return hosted_store(master_addr, master_port)

    dynamic_rendezvous.DynamicRendezvousHandler = OnOneInterface
    if arguments.standalone:
        store = hosted_store(LOOPBACK, 0)
        arguments.standalone, arguments.local_addr = False, LOOPBACK
        arguments.rdzv_backend, arguments.rdzv_id = "c10d", str(uuid4())
        arguments.rdzv_endpoint, arguments.rdzv_conf = f"{LOOPBACK}:{store.port}", "is_host=0"
        return store
    host, port = parse_rendezvous_endpoint(arguments.rdzv_endpoint, default_port=29400)
    if not arguments.rdzv_endpoint or not _matches_machine_hostname(host):
        return None
    try:
        store = hosted_store(host, port)
    except (OSError, RuntimeError):  # another launcher on this node hosts it
        store = None
    arguments.rdzv_conf = ",".join(filter(None, [arguments.rdzv_conf, "is_host=0"]))
    return store


def rendezvous_failure(endpoint: str, nnodes: str, error: Exception) -> str:
    """Returns why the nodes did not meet, and the remedy."""
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

    if isinstance(error, RendezvousConnectionError):
        rule = (
            "does not answer as this job's meeting point: another program has the port, or the node cannot be reached"
        )
        return f"--rdzv-endpoint={endpoint} {rule}; try another port, or another node"
    if isinstance(error, RendezvousTimeoutError):
        rule = f"was not reached by all of --nnodes={nnodes} nodes in time"
        return f"--rdzv-endpoint={endpoint} {rule}; start the same command on every node, with one --rdzv-id"
    return f"--rdzv-endpoint={endpoint} could not bring the nodes together: {' '.join(str(error).split())}; try another --rdzv-id"


if __name__ == "__main__":
    os._exit(main())  # a thread may still wait for an answer
