"""What surrounds the work of a process that trains: signals, errors, its exit code and its last sentence.

Exit codes: 0 done, 1 anything else, 3 configuration, 4 data, 5 checkpoint, 6 a loss or gradient that is not finite, 7 stopped on request, 130 left
at once on a second Ctrl-C. docs/launch.md has the same table for users.
"""

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ssa_pretrain.endings import (
    STOP,
    Ending,
    another_failed,
    end_process,
    end_with_launcher,
    last_words,
    launch_folder,
    signal_name,
    write_ending,
)
from ssa_pretrain.signals import STOPPED, STOPS, on_signals, survive_terminal

FIRST_SECONDS = 15.0  # for rank 0 to close its log (W&B takes up to eleven) and to report why the run ends
NOTICE_SECONDS = 1.0  # for the launcher to notice that another rank was killed, before a SIGTERM is taken for a stop
FOLLOW_SECONDS = (
    5.0  # for the launcher to notice that another rank was killed, before a lost connection is reported as an error
)


@contextmanager
def rank_process(stopped: str, *, code: int = STOPPED, signals: Sequence[signal.Signals] = STOPS) -> Iterator[None]:
    """Surrounds a rank's whole life: it ends with its launcher, reports to it how it has ended, and leaves at once when it is asked to stop.

    Args:
        stopped: what is reported then, after the signal's name: "stopped before training began; …". `Interruption` takes over while a run trains.
        code: the exit code then.
        signals: those that ask it to stop.
    """
    given = os.environ.get("RANK", "0")  # anything but a number is reported with the configuration
    folder, rank = launch_folder(), int(given) if given.isdecimal() else 0

    def leave_at_once(number: signal.Signals) -> None:
        # Without a stop of the launcher's, the signal most likely is its way to end the ranks that are left.
        if folder and not (folder / STOP).exists() and _follows(folder, rank, NOTICE_SECONDS):
            write_ending(folder, Ending(rank, code, follows=True))
        elif folder or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            last_words(f"{signal_name(number)}: {stopped}", code=code)
        end_process(code)

    survive_terminal()
    if folder:
        end_with_launcher(folder)
    with on_signals(leave_at_once, signals):
        try:
            yield
        except SystemExit as leaving:
            if folder and (isinstance(leaving.code, int) or leaving.code is None):
                write_ending(folder, Ending(rank, leaving.code or 0))
            raise
        except BaseException as error:
            if folder:
                _report_error(folder, rank, error)
            raise
        if folder:
            write_ending(folder, Ending(rank, 0))


def leave(error: Exception, code: int) -> None:
    """Reports what is wrong, once per node, and exits without waiting for other ranks' work, which may never end.

    What all ranks have to report rank 0 reports first: a launcher ends it as soon as another has left. What only one rank met has `of_one_rank`,
    and that rank reports it at once.
    """
    rank, alone = int(os.environ.get("RANK", "0")), getattr(error, "of_one_rank", False)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        last_words(str(error), code=code)
        sys.exit(code)
    from ssa_pretrain.parallel.agreement import first_has_spoken

    if rank == 0:
        last_words(str(error), code=code, alone=alone)
    first_has_spoken(is_first=rank == 0, seconds=0.0 if alone else FIRST_SECONDS)
    if rank != 0:
        last_words(str(error), code=code, alone=alone)
    end_process(code)


def quieten_libraries() -> None:
    """Hides megatron-core's remarks on optional packages and settings; what matters of them is in the banner."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # "Unknown MLP type": ours


def _report_error(folder: Path, rank: int, error: BaseException) -> None:
    """Reports an error that nothing expects to the launcher, unless it only follows from another rank's end; ends the process if there are others."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and isinstance(error, RuntimeError) and _follows(folder, rank, FOLLOW_SECONDS):
        write_ending(folder, Ending(rank, 1, follows=True))
        time.sleep(FOLLOW_SECONDS)  # DeepSpeed's launcher looks once per second, and should see the other rank first
        end_process(1)
    line = " ".join(f"{type(error).__name__}: {error}".split())
    shown = line if len(line) <= 300 else line[:297] + "..."
    write_ending(folder, Ending(rank, 1, f"rank {rank} failed, its trace is above: {shown}", alone=True))
    if several:  # the interpreter's own end could wait for other ranks
        traceback.print_exception(error)
        end_process(1)


def _follows(folder: Path, rank: int, seconds: float) -> bool:
    """Whether another rank has failed: waits a moment for the launcher to notice."""
    deadline = time.monotonic() + seconds
    while not (found := another_failed(folder, rank)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
