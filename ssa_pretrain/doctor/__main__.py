"""Entry point: `python -m ssa_pretrain.doctor [OUTPUT_DIR] [--json]` prints what is wrong with this machine, one line per check.

Under torchrun it also checks what lies between the nodes of a job, and rank 0 prints one page for all:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29400 -m ssa_pretrain.doctor OUTPUT_DIR

A line has ok, warn (a run works, but slowly or at a risk) or fail (it fails or hangs), what was found, and after an arrow the remedy. It changes nothing
but for a file of 64 MiB that it writes beside the run's folder and removes. Exit codes: 0 nothing fails, 1 something fails, 3 wrong arguments.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ssa_pretrain.doctor.findings import Finding, as_json, exit_code, fail, page, run_check
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.process import command, exit_now
from ssa_pretrain.settings.output import pipe_may_close, version_line


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, runs the checks and prints the page; exits with its code."""
    with command("doctor"), pipe_may_close():
        arguments = read_arguments(argv)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            findings, prints = diagnose_job(arguments.folder)
        else:
            findings, prints = diagnose(arguments.folder), True
        if prints:
            heading = f"doctor on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
            print(as_json(findings) if arguments.json else page(findings, heading), flush=True)
        wait_for_rank_0()
    exit_now(exit_code(findings))  # a check that does not answer may still have a thread


def diagnose(folder: Path) -> list[Finding]:
    """Returns the findings about this machine.

    Args:
        folder: the run's folder, which may not exist yet.
    """
    from ssa_pretrain.doctor import gpus, machine, storage

    checks = {
        "packages": machine.python_and_packages,
        "driver": gpus.driver,
        "torch and gpu": gpus.torch_and_cuda,
        "environment": gpus.environment,
        "memory": machine.memory,
        "/dev/shm": machine.shared_memory,
        "ulimit": machine.limits,
        "output_dir": lambda: storage.run_folder(folder),
        "compiler caches": machine.compiler_caches,
        "clock": machine.clock,
        "network": machine.network,
    }
    return [found for name, check in checks.items() for found in run_check(name, check)]


def diagnose_job(folder: Path) -> tuple[list[Finding], bool]:
    """Returns the findings about all nodes of a job and between them, and whether this rank prints them."""
    from ssa_pretrain.doctor import job

    is_rank_0, host = os.environ.get("RANK") == "0", socket.gethostname()
    one_per_node = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        job.join()
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        remedy = "check --rdzv-endpoint, firewalls between the nodes, and that every node runs this command"
        return [fail("rendezvous", f"the ranks do not meet: {text}", remedy)], is_rank_0
    own = [replace(one, host=host) for one in diagnose(folder)] if one_per_node else []
    return [*job.gather(own), *job.checks(folder)], is_rank_0


def wait_for_rank_0() -> None:
    """Waits until rank 0 of a job has printed: a launcher ends all ranks when one exits with an error."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        with suppress(RuntimeError, ValueError):
            dist.barrier()


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments of the command line; exits with 3 if they are wrong."""
    from ssa_pretrain.monitor.environment import PACKAGES

    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.doctor",
        description="What is wrong with this machine, or with the machines of a job.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="output_dir of a run (outputs)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a page")
    parser.add_argument("--version", action="version", version=version_line("ssa_pretrain", PACKAGES[1:]))
    try:
        return parser.parse_args(argv)
    except SystemExit as exiting:  # argparse's own code is 2
        sys.exit(ExitCode.CONFIGURATION if exiting.code else ExitCode.DONE)


if __name__ == "__main__":
    main()
