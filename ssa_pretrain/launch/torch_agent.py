"""torchrun under our launcher: the same arguments, without its report of 40 lines after the sentence of a rank.

It sends its signals to the launcher, which passes them on to the ranks. torch would kill the ranks after half a minute, and leave them
behind on a second signal. It writes the exit codes of the ranks, or why the nodes did not meet, into the launcher's folder (supervision.py).
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

from ssa_pretrain.launch.supervision import AGENT, FAILURES
from ssa_pretrain.process import LAUNCH, exit_when_launcher_ends
from ssa_pretrain.signals import STOP_SIGNALS, on_signals

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
            run(arguments)
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
